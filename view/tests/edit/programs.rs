//! Programs that people use, in an edited view.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ground::{ALL, Backend, with_ground, with_ground_of};

#[test]
fn programs_of_a_view_are_executed_and_thousands_of_files_are_open_at_once() {
    with_ground(|ground| {
        let mounted = ground.edit();
        let at = |name: &str| ground.at("view").join(name);
        fs::copy("/bin/true", at("program")).unwrap();
        assert!(Command::new(at("program")).status().unwrap().success());
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit.current = limit.maximum;
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let many = limit.maximum.unwrap_or(u64::MAX).min(5000) as usize - 100;
        let files: Vec<File> = (0..many)
            .map(|number| {
                let path = at(&format!("many-{number}"));
                File::options().read(true).write(true).create_new(true).open(path).unwrap()
            })
            .collect();
        for (number, file) in files.iter().enumerate() {
            std::os::unix::fs::FileExt::write_all_at(file, number.to_string().as_bytes(), 3).unwrap();
        }
        for number in (0..many).step_by(97) {
            assert_eq!(fs::read(at(&format!("many-{number}"))).unwrap()[3..], *number.to_string().as_bytes());
        }
        drop(files);
        mounted.unmount().unwrap();
    });
}

#[test]
fn compilers_databases_and_git_work_in_an_edited_view() {
    for program in ["gcc", "make", "python3", "git"] {
        if kiln_fixtures::require(program).is_none() {
            return;
        }
    }
    ALL.into_iter().for_each(programs_work);
}

fn programs_work(backend: Backend) {
    with_ground_of(backend, move |ground| {
        let mounted = ground.edit();
        let script = r#"
            set -e; cd "$1"; export HOME="$1" TMPDIR="$1"
            mkdir src; cd src
            echo 'int twice(int n) { return 2 * n; }' > twice.c
            echo '#include <stdio.h>' > main.c
            echo 'int twice(int); int main(void) { printf("%d", twice(21)); return 0; }' >> main.c
            printf 'program: main.o libtwice.a\n\tgcc -o $@ $^\nlibtwice.a: twice.o\n\tar rcs $@ $^\n' > Makefile
            make -s -j2; test "$(./program)" = 42; touch twice.c; make -s; make -q
            python3 - <<'END'
import mmap, os, sqlite3, tempfile
base = sqlite3.connect("base"); base.execute("pragma journal_mode=wal"); base.execute("create table t (n)")
for n in range(50):
    with base: base.execute("insert into t values (?)", (n,))
base.close()
assert sqlite3.connect("base").execute("select sum(n) from t").fetchone() == (1225,)
with tempfile.TemporaryDirectory(dir=".") as place:
    for n in range(300): open(f"{place}/{n}", "w").write(str(n))
    os.rename(place, "moved"); os.rename("moved", place)
with open("mapped", "w+b") as file:
    file.truncate(9000); map = mmap.mmap(file.fileno(), 0); map[5000:5005] = b"hello"; map.flush()
    file.seek(5000); assert file.read(5) == b"hello"
END
            # A router takes a daemon that detaches outside of `kiln fs run` for a stranger: no cleaning up in the background.
            git config --global gc.auto 0; git config --global maintenance.auto false
            cd ..; git init -q repository; cd repository; git config user.name a; git config user.email a@b
            cp -r ../a ../src .; rm a/g; git add .; git commit -qm first; mv a z; git add -A; git commit -qm second
            git gc -q; git fsck --strict 2>/dev/null; git checkout -q HEAD~1; test -e a/large
            test -z "$(git status --short)""#;
        let run = Command::new("sh").args(["-c", script, "sh"]).arg(ground.at("view")).output().unwrap();
        assert!(run.status.success(), "{backend:?}: {}", String::from_utf8_lossy(&run.stderr));
        mounted.unmount().unwrap();
    });
}

/// The sources of the C library of Zstandard, which this workspace builds too.
fn zstd() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    // What other platforms need may never have been downloaded.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    cargo.args(["metadata", "--format-version", "1", "--offline", "--filter-platform", &platform]);
    cargo.arg("--manifest-path");
    let output = cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).output().unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["name"] == "zstd-sys").unwrap();
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("zstd/lib")
}

#[test]
fn a_c_library_is_built_and_works_and_pythons_own_tests_pass() {
    for program in ["gcc", "make", "ar", "python3"] {
        if kiln_fixtures::require(program).is_none() {
            return;
        }
    }
    let sources = zstd();
    for backend in ALL {
        let sources = sources.clone();
        with_ground_of(backend, move |ground| {
            let mounted = ground.edit();
            let run = Command::new("sh")
                .args(["-c", include_str!("programs.sh"), "sh"])
                .arg(ground.at("view"))
                .arg(&sources)
                .output()
                .unwrap();
            let (told, error) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
            assert!(run.status.success(), "{backend:?}: {told}{error}");
            mounted.unmount().unwrap();
        });
    }
}
