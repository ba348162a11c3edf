//! Packages from where this host's apt gets them.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_contract::{Progress, Step};

use crate::error::{BootError, Result, Tool};
use crate::tools;

const TOOLS: &[Tool] =
    &[Tool { program: "apt-get", package: "apt" }, Tool { program: "apt-cache", package: "apt" }];

/// Downloads into `directory` what the first of `names` that apt knows depends on, and what that depends on in turn,
/// as far as the names begin with one of `prefixes`.
///
/// Distributions name their newest kernel by a package without content, `linux-image-amd64`, that depends on
/// `linux-image-6.1.0-47-amd64`; Ubuntu's depends on `linux-modules-…` in turn.
pub(crate) fn download(
    names: &[&str],
    prefixes: &[&str],
    directory: &Path,
    progress: &dyn Progress,
) -> Result<Vec<PathBuf>> {
    tools::require("downloading a package of this host's distribution", TOOLS)?;
    let wanted = |package: &str| depends(package, prefixes);
    let mut packages =
        names.iter().map(|name| wanted(name)).find(|found| !found.is_empty()).unwrap_or_default();
    if packages.is_empty() {
        return Err(BootError::NotInApt { packages: names.iter().map(|&name| name.to_owned()).collect() });
    }
    let mut next = 0;
    while let Some(package) = packages.get(next) {
        for more in wanted(package) {
            if !packages.contains(&more) {
                packages.push(more);
            }
        }
        next += 1;
    }
    packages.iter().map(|package| fetch(package, directory, progress)).collect()
}

/// The packages that `package` depends on whose names begin with one of `prefixes`; none if apt does not know it.
fn depends(package: &str, prefixes: &[&str]) -> Vec<String> {
    let doing = format!("finding what {package} depends on");
    let listed = tools::run(&doing, "apt-cache", ["depends", "--important", package], Path::new("/"));
    let listed = listed.inspect_err(|error| tracing::debug!("{error}")).unwrap_or_default();
    parse_depends(&listed, prefixes)
}

/// From lines such as `  Depends: linux-image-6.1.0-47-amd64`; alternatives begin with `|`, virtual ones with `<`.
fn parse_depends(listed: &str, prefixes: &[&str]) -> Vec<String> {
    let dependencies = listed.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let is_name =
        |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.:".contains(&byte));
    dependencies
        .filter(|name| is_name(name) && prefixes.iter().any(|prefix| name.starts_with(prefix)))
        .map(str::to_owned)
        .collect()
}

/// Downloads one package.
fn fetch(package: &str, directory: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    let doing = format!("downloading {package}");
    let before = files(directory)?;
    let total = size(package);
    let step = progress.begin(Step { name: package.into(), verb: "download", total });
    let mut done = 0;
    let mut command = tools::command("apt-get");
    command.args(["--quiet", "download", package]).current_dir(directory);
    let child = command.spawn().map_err(|error| tools::failed(&doing, "apt-get", &error.to_string()))?;
    let report = || {
        let size_of = |path: &PathBuf| fs::metadata(path).map_or(0, |found| found.len());
        let now = files(directory).unwrap_or_default();
        let size = now.iter().filter(|path| !before.contains(path)).map(size_of).sum::<u64>();
        progress.advance(step, size.cast_signed().saturating_sub(done));
        done = size.cast_signed();
    };
    let finished = tools::finish(&doing, "apt-get", child, report);
    progress.end(step, if finished.is_ok() { "done" } else { "failed" });
    finished?;
    let after = files(directory)?;
    let file = after.into_iter().find(|path| !before.contains(path));
    file.ok_or_else(|| tools::failed(&doing, "apt-get", "it left no file"))
}

/// How large the file of `package` is, if apt says so.
fn size(package: &str) -> Option<u64> {
    let doing = format!("asking for the size of {package}");
    let shown =
        tools::run(&doing, "apt-cache", ["show", "--no-all-versions", package], Path::new("/")).ok()?;
    shown.lines().find_map(|line| line.strip_prefix("Size: ")?.trim().parse().ok())
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).map_err(BootError::doing("list", directory))?;
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    Ok(paths.filter(|path| path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_and_alternatives_left_out() {
        let listed = "linux-image-generic\n  Depends: linux-image-6.8.0-31-generic\n |Depends: linux-image-other\n  \
                      Depends: <linux-image-virtual>\n  Depends: linux-modules-extra-6.8.0-31-generic\n  Depends: kmod\n";
        assert_eq!(
            parse_depends(listed, &["linux-image-", "linux-modules-"]),
            ["linux-image-6.8.0-31-generic", "linux-modules-extra-6.8.0-31-generic"]
        );
        assert!(parse_depends("", &["linux-image-"]).is_empty());
    }
}
