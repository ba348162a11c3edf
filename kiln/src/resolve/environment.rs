//! Environment variables: the image's, then files, then flags.

use std::path::PathBuf;

use super::{Host, ResolveError, Result};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What was typed: `--env-file` and `--env`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Typed<'a> {
    /// Files of `NAME=value` lines.
    pub(crate) files: &'a [PathBuf],
    /// `NAME=value`, or `NAME` for the host's value.
    pub(crate) variables: &'a [String],
}

/// The whole environment of a workload, each name once, in the order in which names first appear.
///
/// A `PATH` is added if nobody sets one, and `TERM=xterm` with a terminal. `HOSTNAME` and `HOME` depend on the
/// running container, and are added when it is made.
pub(crate) fn environment(
    image: &[String],
    typed: Typed<'_>,
    tty: bool,
    host: &Host<'_>,
) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for line in image {
        set(&mut all, line.clone());
    }
    apply(&mut all, typed, host)?;
    if !all.iter().any(|line| line.starts_with("PATH=")) {
        all.insert(0, DEFAULT_PATH.to_owned());
    }
    if tty && !all.iter().any(|line| line.starts_with("TERM=")) {
        all.push("TERM=xterm".to_owned());
    }
    Ok(all)
}

/// What `exec` adds to the environment of a running container.
pub(crate) fn exec_environment(
    files: &[PathBuf],
    variables: &[String],
    host: &Host<'_>,
) -> Result<Vec<String>> {
    let mut all = Vec::new();
    apply(&mut all, Typed { files, variables }, host)?;
    Ok(all)
}

fn apply(all: &mut Vec<String>, typed: Typed<'_>, host: &Host<'_>) -> Result<()> {
    for file in typed.files {
        for line in host.lines_of("environment file", file)? {
            if line.split('=').next().is_some_and(|name| name.contains(char::is_whitespace)) {
                let why = format!("a name in it has white space: `{line}`");
                return Err(ResolveError::value("--env-file", file.display().to_string(), why));
            }
            apply_one(all, &line, host, "--env-file")?;
        }
    }
    typed.variables.iter().try_for_each(|line| apply_one(all, line, host, "--env"))
}

fn apply_one(all: &mut Vec<String>, line: &str, host: &Host<'_>, flag: &'static str) -> Result<()> {
    if line.is_empty() || line.starts_with('=') {
        return Err(ResolveError::value(flag, line, "a variable needs a name"));
    }
    if line.contains('\0') {
        return Err(ResolveError::value(flag, line, "a variable cannot hold a NUL byte"));
    }
    if line.contains('=') {
        set(all, line.to_owned());
    } else {
        match (host.variable)(line) {
            Some(value) => set(all, format!("{line}={value}")),
            // The host does not have it: then the workload does not either, whatever the image says.
            None => all.retain(|other| name(other) != line),
        }
    }
    Ok(())
}

fn set(all: &mut Vec<String>, line: String) {
    match all.iter_mut().find(|other| name(other) == name(&line)) {
        Some(other) => *other = line,
        None => all.push(line),
    }
}

fn name(line: &str) -> &str {
    super::pair(line).0
}

#[cfg(test)]
mod tests {
    use super::super::testing::with_host;
    use super::*;

    #[test]
    fn variables_merge_image_then_files_then_flags() {
        let files = [("/f", "# a comment\n\nA=file\nHOST_VAR\nNOT_THERE\n  B=x y ")];
        type Words<'a> = &'a [&'a str];
        let table: [(Words<'_>, Words<'_>, Words<'_>, Words<'_>); 7] = [
            (&["PATH=/bin", "A=1"], &[], &[], &["PATH=/bin", "A=1"]),
            (&["PATH=/bin", "A=1"], &[], &["A=2"], &["PATH=/bin", "A=2"]),
            (&["PATH=/bin"], &["/f"], &["A=flag"], &["PATH=/bin", "A=flag", "HOST_VAR=from-host", "B=x y "]),
            (&["PATH=/bin"], &[], &["HOST_VAR"], &["PATH=/bin", "HOST_VAR=from-host"]),
            (&["PATH=/bin", "GONE=1"], &[], &["GONE"], &["PATH=/bin"]),
            (&["A=1"], &[], &["A="], &[DEFAULT_PATH, "A="]),
            (&["PATH=/bin"], &[], &["X=a=b"], &["PATH=/bin", "X=a=b"]),
        ];
        for (image, env_files, flags, expected) in table {
            let own = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
            let env_files: Vec<PathBuf> = env_files.iter().map(PathBuf::from).collect();
            let flags = own(flags);
            let typed = Typed { files: &env_files, variables: &flags };
            let got = with_host(&files, |host| environment(&own(image), typed, false, host)).unwrap();
            assert_eq!(got, own(expected), "{image:?} {flags:?}");
        }
    }

    #[test]
    fn a_terminal_brings_term_unless_somebody_sets_it() {
        let got = with_host(&[], |host| environment(&[], Typed::default(), true, host)).unwrap();
        assert_eq!(got, [DEFAULT_PATH, "TERM=xterm"]);
        let image = ["TERM=dumb".to_owned()];
        let got = with_host(&[], |host| environment(&image, Typed::default(), true, host)).unwrap();
        assert_eq!(got, [DEFAULT_PATH, "TERM=dumb"]);
    }

    #[test]
    fn nameless_variables_and_missing_files_are_refused() {
        for bad in ["", "=x"] {
            let flags = [bad.to_owned()];
            let typed = Typed { files: &[], variables: &flags };
            assert!(with_host(&[], |host| environment(&[], typed, false, host)).is_err(), "{bad:?}");
        }
        let missing = [PathBuf::from("/missing")];
        let typed = Typed { files: &missing, variables: &[] };
        let error = with_host(&[], |host| environment(&[], typed, false, host)).unwrap_err();
        assert!(error.to_string().contains("/missing"), "{error}");
    }
}
