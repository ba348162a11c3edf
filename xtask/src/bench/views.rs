//! Views beside the kernel's overlay and fuse-overlayfs on plain directories, and a plain directory.
//!
//! Images are made of tars that are written here, so that a million entries need no million files on the disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::disk::directory;
use super::measures::{Images, ratio_row};
use super::peers::scratch;
use super::sampling::{medians, quietly, settle, timed};
use super::table::{Row, seconds};
use super::view_trees::{Tree, scaled};
use crate::kiln::Kiln;
use crate::shell::{Outcome, capture};

/// A Kiln with images, and a directory where views are shown.
struct Bed {
    kiln: Kiln,
    directory: tempfile::TempDir,
}

impl Bed {
    fn new(program: &Path) -> Outcome<Self> {
        let bed = Self { kiln: Kiln::below(&directory(), program)?, directory: scratch()? };
        fs::create_dir(bed.at()).map_err(|error| format!("cannot make {}: {error}", bed.at().display()))?;
        Ok(bed)
    }

    fn at(&self) -> PathBuf {
        self.directory.path().join("at")
    }

    /// Brings a tree in as an image of one layer.
    fn image(&self, name: &str, tree: &Tree) -> Outcome {
        tree.write_tar(&self.tar())?;
        self.import(name)
    }

    /// Brings what is in a directory in as an image of one layer.
    fn image_of(&self, name: &str, directory: &Path) -> Outcome {
        capture(Command::new("tar").arg("-cf").arg(self.tar()).arg("-C").arg(directory).arg("."))?;
        self.import(name)
    }

    fn tar(&self) -> PathBuf {
        self.directory.path().join("layer.tar")
    }

    fn import(&self, name: &str) -> Outcome {
        let (tar, reference) = (self.tar(), format!("bench/{name}:1"));
        quietly(&mut self.kiln.command(["image", "import", "-q", &tar.to_string_lossy(), &reference]))
    }

    /// `kiln fs run` of a command.
    fn run(&self, backend: &str, reference: &str, more: &[&str], command: &[&str]) -> Command {
        let at = self.at();
        let at = at.to_string_lossy();
        let mut words = vec!["fs", "run", "--backend", backend, "--at", &at];
        words.extend(more);
        words.extend([reference, "--"]);
        words.extend(command);
        self.kiln.command(words)
    }

    fn time(&self, backend: &str, reference: &str, command: &[&str]) -> Outcome<f64> {
        timed(|| quietly(&mut self.run(backend, reference, &[], command)))
    }
}

/// A script that tells how many nanoseconds `script` took the second time it ran; `@` in it is `at`.
fn warm(script: &str, at: &Path) -> String {
    let script = script.replace("@", &at.to_string_lossy());
    format!("{script}; s=$(date +%s%N); {script}; e=$(date +%s%N); echo $((e - s))")
}

/// The seconds that such a script told.
fn said(command: &mut Command) -> Outcome<f64> {
    let text = capture(command)?;
    let nanoseconds = text.lines().last().and_then(|line| line.trim().parse::<f64>().ok());
    nanoseconds.map(|nanoseconds| nanoseconds / 1e9).ok_or_else(|| format!("no time in {text:?}"))
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// Has the kernel forget names, attributes and data that are on the disk, as after a boot.
fn forget() -> Outcome {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(|error| format!("cannot drop caches: {error}"))
}

/// A figure with a bound of its own.
fn bounded(measure: &str, value: f64, goal: f64) -> Row {
    Row {
        measure: measure.to_owned(),
        kiln: seconds(value),
        peers: String::new(),
        result: seconds(value),
        goal: format!("≤ {}", seconds(goal)),
        met: value <= goal,
    }
}

/// From the command to its end, by layers and by entries; the memory of a server.
pub(super) fn starts(program: &Path, _: &Images) -> Outcome<Vec<Row>> {
    let bed = Bed::new(program)?;
    let mut names = Vec::new();
    for number in 0..200 {
        let name = format!("layer{number}");
        bed.image(&name, &Tree::small(number))?;
        names.push(format!("bench/{name}:1"));
    }
    let (five, many) = (names[..5].join("+"), "bench/many:1");
    let commit = format!("{} fs commit -t {many} > /dev/null", program.display());
    quietly(&mut bed.run(
        "overlay",
        &names.join("+"),
        &["--edit"],
        &["sh", "-c", &format!("echo 1 > {}/x && {commit}", bed.at().display())],
    ))?;
    let (few_entries, most) = (scaled(1_000), scaled(1_000_000));
    bed.image("few", &Tree::empty_files(few_entries))?;
    bed.image("most", &Tree::empty_files(most))?;
    let time = |backend: &'static str, reference: &str| bed.time(backend, reference, &["true"]);
    settle();
    let [overlay, fuse, many_overlay, many_fuse, small, large] = medians(
        30,
        [
            Box::new(|| time("overlay", &five)),
            Box::new(|| time("fuse", &five)),
            Box::new(|| time("overlay", many)),
            Box::new(|| time("fuse", many)),
            Box::new(|| time("fuse", "bench/few:1")),
            Box::new(|| time("fuse", "bench/most:1")),
        ],
    )?;
    let find =
        format!("find {} > /dev/null; cat /proc/$(pgrep -n kiln-view)/smaps_rollup", bed.at().display());
    let rollup = capture(&mut bed.run("fuse", "bench/most:1", &[], &["sh", "-c", &find]))?;
    let kilobytes = rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Pss_Anon:").or_else(|| line.strip_prefix("Pss_Shmem:")));
    let kilobytes: f64 =
        kilobytes.filter_map(|text| text.trim().trim_end_matches(" kB").parse::<f64>().ok()).sum();
    let megabytes = kilobytes / 1024.0;
    Ok(vec![
        bounded("`kiln fs run REF -- true`, 5 layers, overlay", overlay, 0.010),
        bounded("the same, fuse", fuse, 0.025),
        ratio_row("the same, 201 layers, overlay", many_overlay, &[("5 layers", overlay)], 1.1),
        ratio_row("the same, 201 layers, fuse", many_fuse, &[("5 layers", fuse)], 1.1),
        ratio_row(
            &format!("view of {most} entries, fuse"),
            large,
            &[(&format!("{few_entries} entries"), small)],
            1.2,
        ),
        Row {
            measure: format!("memory of its server after `find` over {most} entries"),
            kiln: format!("{megabytes:.1} MB"),
            peers: String::new(),
            result: format!("{megabytes:.1} MB"),
            goal: "≤ 20 MB".to_owned(),
            met: megabytes <= 20.0,
        },
    ])
}

/// `find` over many files, cold and warm, and `git status`.
pub(super) fn walks(program: &Path, _: &Images) -> Outcome<Vec<Row>> {
    let bed = Bed::new(program)?;
    let files = scaled(100_000);
    let tree = Tree::empty_files(files);
    bed.image("walked", &tree)?;
    let (plain, mounted) = (bed.directory.path().join("plain"), bed.directory.path().join("mounted"));
    tree.write_directory(&plain)?;
    let empty = bed.directory.path().join("empty");
    for path in [&mounted, &empty] {
        fs::create_dir(path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
    }
    let find = |at: &Path| format!("find {} > /dev/null", at.display());
    let lower = format!("lowerdir={}:{}", empty.display(), plain.display());
    let kernel = format!("mount -t overlay -o {lower} overlay");
    let fuse_overlayfs = format!("fuse-overlayfs -o {lower}");
    let at = bed.at();
    let cold = |command: &mut Command| {
        forget()?;
        timed(|| quietly(command))
    };
    let [overlay, fuse, plainly, peer] = medians(
        5,
        [
            Box::new(|| cold(&mut bed.run("overlay", "bench/walked:1", &[], &["sh", "-c", &find(&at)]))),
            Box::new(|| cold(&mut bed.run("fuse", "bench/walked:1", &[], &["sh", "-c", &find(&at)]))),
            Box::new(|| cold(&mut shell(&find(&plain)))),
            Box::new(|| cold(&mut over(&fuse_overlayfs, &mounted, &find(&mounted)))),
        ],
    )?;
    let again = "find @ > /dev/null";
    let [warm_overlay, warm_fuse, warm_kernel] = medians(
        5,
        [
            Box::new(|| {
                said(&mut bed.run("overlay", "bench/walked:1", &[], &["sh", "-c", &warm(again, &at)]))
            }),
            Box::new(|| said(&mut bed.run("fuse", "bench/walked:1", &[], &["sh", "-c", &warm(again, &at)]))),
            Box::new(|| said(&mut over(&kernel, &mounted, &warm(again, &mounted)))),
        ],
    )?;
    let mut rows = vec![
        ratio_row(&format!("cold `find` over {files} files, fuse"), fuse, &[("fuse-overlayfs", peer)], 0.4),
        ratio_row("the same, overlay", overlay, &[("plain directory", plainly)], 0.6),
        ratio_row("warm `find`, overlay", warm_overlay, &[("kernel overlay", warm_kernel)], 1.1),
        ratio_row("warm `find`, fuse", warm_fuse, &[("kernel overlay", warm_kernel)], 1.1),
    ];
    rows.extend(git_status(&bed, &repository(&bed)?)?);
    Ok(rows)
}

/// A script for which `mount` mounts something at `at`, and which takes that away at its end.
fn over(mount: &str, at: &Path, script: &str) -> Command {
    let at = at.display();
    shell(&format!("{mount} {at} && {{ {script}; }}; r=$?; umount {at}; exit $r"))
}

/// A repository of many files, as a directory and as an image.
fn repository(bed: &Bed) -> Outcome<PathBuf> {
    let repository = bed.directory.path().join("repository");
    Tree::small_files(scaled(20_000)).write_directory(&repository)?;
    let git =
        "git init -q && git add . && git -c user.name=bench -c user.email=bench@localhost commit -q -m all";
    capture(shell(git).current_dir(&repository))?;
    bed.image_of("repository", &repository)?;
    Ok(repository)
}

fn git_status(bed: &Bed, repository: &Path) -> Outcome<Vec<Row>> {
    let directory = |name: &str| bed.directory.path().join(name);
    let (upper, work, mounted) = (directory("upper"), directory("work"), directory("mounted"));
    let status = "git -C @ -c safe.directory=* status --porcelain";
    let at = bed.at();
    let kernel = || {
        for path in [&upper, &work] {
            let _ = fs::remove_dir_all(path);
            fs::create_dir(path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        }
        let mount = format!(
            "mount -t overlay -o lowerdir={},upperdir={},workdir={} overlay",
            repository.display(),
            upper.display(),
            work.display()
        );
        said(&mut over(&mount, &mounted, &warm(status, &mounted)))
    };
    let view = |backend| {
        said(&mut bed.run(backend, "bench/repository:1", &["--edit"], &["sh", "-c", &warm(status, &at)]))
    };
    let [overlay, fuse, peer] =
        medians(5, [Box::new(|| view("overlay")), Box::new(|| view("fuse")), Box::new(kernel)])?;
    Ok(vec![
        ratio_row("warm `git status`, editable, overlay", overlay, &[("kernel overlay", peer)], 1.1),
        ratio_row("the same, fuse", fuse, &[("kernel overlay", peer)], 1.1),
    ])
}

/// One large file from its start to its end, and a compiler at work.
pub(super) fn data(program: &Path, _: &Images) -> Outcome<Vec<Row>> {
    let bed = Bed::new(program)?;
    let source = bed.directory.path().join("source");
    let sources = scaled(200);
    Tree::c_project(sources).write_directory(&source)?;
    let megabytes = scaled(1024);
    capture(&mut shell(&format!("head -c {megabytes}M /dev/urandom > {}/large", source.display())))?;
    bed.image_of("source", &source)?;
    let at = bed.at();
    // What is in the page cache is there for all; what a server has opened before is not.
    let read = |at: &Path| {
        let at = at.display();
        format!(
            "s=$(date +%s%N); dd if={at}/large of=/dev/null bs=1M status=none; e=$(date +%s%N); echo $((e - s))"
        )
    };
    let view = |more: &'static [&'static str]| {
        said(&mut bed.run("fuse", "bench/source:1", more, &["sh", "-c", &read(&at)]))
    };
    let (mounted, empty) = (bed.directory.path().join("mounted"), bed.directory.path().join("empty"));
    for path in [&mounted, &empty] {
        fs::create_dir(path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
    }
    let fuse_overlayfs = format!("fuse-overlayfs -o lowerdir={}:{}", empty.display(), source.display());
    let [passed, edited, plain, peer] = medians(
        5,
        [
            Box::new(|| view(&[])),
            Box::new(|| view(&["--edit"])),
            Box::new(|| said(&mut shell(&read(&source)))),
            Box::new(|| said(&mut over(&fuse_overlayfs, &mounted, &read(&mounted)))),
        ],
    )?;
    let compile = |at: &Path| {
        format!(
            "cd {} && for f in *.c; do cc -O1 -c $f || exit 1; done && cc *.o -o all && rm -f *.o all",
            at.display()
        )
    };
    let [in_view, in_overlay, in_plain] = medians(
        3,
        [
            Box::new(|| {
                timed(|| {
                    quietly(&mut bed.run("fuse", "bench/source:1", &["--edit"], &["sh", "-c", &compile(&at)]))
                })
            }),
            Box::new(|| {
                timed(|| {
                    quietly(&mut bed.run(
                        "overlay",
                        "bench/source:1",
                        &["--edit"],
                        &["sh", "-c", &compile(&at)],
                    ))
                })
            }),
            Box::new(|| timed(|| quietly(&mut shell(&compile(&source))))),
        ],
    )?;
    let file = [("plain file", plain)];
    let directory = [("plain directory", in_plain)];
    Ok(vec![
        ratio_row(
            &format!("sequential read of {megabytes} MiB, fuse, with passthrough"),
            passed,
            &file,
            1.11,
        ),
        ratio_row(
            "the same, editable, without passthrough",
            edited,
            &[file[0], ("fuse-overlayfs", peer)],
            2.0,
        ),
        ratio_row("compile of a C project in an edited view, fuse", in_view, &directory, 1.25),
        ratio_row("the same, overlay", in_overlay, &directory, 1.25),
    ])
}

/// Commits: of many files, and of one among very many.
pub(super) fn commits(program: &Path, _: &Images) -> Outcome<Vec<Row>> {
    let bed = Bed::new(program)?;
    let files = scaled(10_000);
    let tree = Tree::small_files(files);
    let plain = bed.directory.path().join("plain");
    tree.write_directory(&plain)?;
    bed.image("empty", &Tree::small(0))?;
    let most = scaled(1_000_000);
    bed.image("most", &Tree::empty_files(most))?;
    let at = bed.at();
    let commit = |reference: &str, change: &str| {
        let (at, kiln) = (at.display(), program.display());
        let script = format!(
            "{} && s=$(date +%s%N) && {kiln} fs commit -t bench/new:1 > /dev/null && e=$(date +%s%N) && echo $((e - s))",
            change.replace('@', &at.to_string())
        );
        said(&mut bed.run("overlay", reference, &["--edit"], &["sh", "-c", &script]))
    };
    let mut round = 0;
    let copy = format!("cp -r {} @/new", plain.display());
    let copies = bed.directory.path().join("copies");
    fs::create_dir(&copies).map_err(|error| format!("cannot make {}: {error}", copies.display()))?;
    let mut copied = 0;
    let [many, tar, files_copied, one] = medians(
        5,
        [
            Box::new(|| {
                round += 1;
                // Other content every time: what is there already is not written again.
                commit("bench/empty:1", &format!("{copy} && for f in @/new/*/*; do echo {round} >> $f; done"))
            }),
            Box::new(|| {
                let script = format!(
                    "tar -cf - -C {} . | sha256sum > /dev/null; find {} -type f -exec sha256sum {{}} + > /dev/null",
                    plain.display(),
                    plain.display()
                );
                timed(|| quietly(&mut shell(&script)))
            }),
            // What it takes to have so many files on the disk at all.
            Box::new(|| {
                copied += 1;
                let (from, to) = (plain.display(), copies.display());
                timed(|| quietly(&mut shell(&format!("cp -r {from} {to}/{copied} && sync -f {to}"))))
            }),
            Box::new(|| commit("bench/most:1", "date > @/changed")),
        ],
    )?;
    Ok(vec![
        ratio_row(
            &format!("commit of {files} new small files"),
            many,
            &[("`tar` and `sha256sum` of the same", tar), ("`cp -r` and `sync` of the same", files_copied)],
            0.7,
        ),
        bounded(&format!("commit of one file among {most}"), one, 0.060),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_timed_the_second_time_it_runs() {
        let directory = tempfile::tempdir().unwrap();
        let script = warm("[ -e @/once ] || sleep 0.3; touch @/once", directory.path());
        let seconds = said(&mut shell(&script)).unwrap();
        assert!(seconds > 0.0 && seconds < 0.25, "{seconds}");
    }
}
