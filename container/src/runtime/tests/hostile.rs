//! What a hostile container sees, and gets hold of, when Kiln's own processes come into it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use kiln_contract::RuntimeChoice;

use super::bed::{Bed, Outcome, own, pipes, runtimes, wait};
use crate::runtime::{ResolvedMount, RuntimeError};

/// Looks, over and over, at every process that is in the container, and writes a word for all that it should not see.
/// By nothing but what the shell itself has: whatever it calls would be too slow.
const WATCH: &str = r#"
    mine=$(sed -n 's/^CapPrm:\t//p' /proc/self/status)
    until [ -e /stop ]; do
        for process in /proc/[0-9]*; do
            [ -e "$process/root$OF_HOST" ] && echo "a root of the host's"
            [ -e "$process/cwd$OF_HOST" ] && echo "a directory of the host's"
            [ "$process/exe" -ef /kiln ] && echo "the program file of Kiln"
            for file in "$process"/fd/*; do [ -d "$file" ] && echo "an open directory"; done
            environment=
            read -r environment <"$process/environ"
            case $environment in *CARGO_MANIFEST_DIR=*) echo "the environment of the caller"; esac
            while read -r key value; do
                case $key in
                    CapPrm:) [ "$value" = "$mine" ] || echo "more capabilities";;
                    Seccomp:) [ "$value" = 2 ] || echo "no filter";;
                esac
            done <"$process/status"
        done
    done 2>/dev/null | sort -u
"#;

#[test]
fn a_container_that_may_look_into_processes_sees_nothing_of_the_hosts_in_those_that_enter() {
    let host = tempfile::tempdir().unwrap();
    let Some(mut bed) = Bed::new(&RuntimeChoice::Native, &["sh", "-c", WATCH]) else { return };
    bed.record.spec.security.cap_add = own(&["SYS_PTRACE"]);
    bed.record.spec.process.env = vec![format!("OF_HOST={}", host.path().display())];
    bed.mounts = vec![ResolvedMount::bind(std::env::current_exe().unwrap(), "/kiln", true, None)];
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    let (streams, [out, _err]) = pipes();
    let created = bed.launch(streams).unwrap();
    for _ in 0..150 {
        assert_eq!(bed.exec(&["true"], |_| {}).unwrap().code, 0);
    }
    fs::write(bed.root.join("stop"), "").unwrap();
    let seen = std::io::read_to_string(fs::File::from(out)).unwrap();
    assert_eq!(wait(created.process), 0);
    bed.record.process = None;
    assert_eq!(seen, "", "seen: {seen}");
}

/// A container in which programs of the host run: the program file of Kiln (here: of these tests) is at `/kiln`, only to
/// compare with, and its libraries where it looks for them. The image names `/proc/self/exe` in every way there is.
fn bed_with_libraries(args: &[&str]) -> Option<Bed> {
    let mut bed = Bed::new(&RuntimeChoice::Native, args)?;
    bed.mounts = vec![ResolvedMount::bind(std::env::current_exe().unwrap(), "/kiln", true, None)];
    for directory in ["/lib", "/lib64", "/usr/lib"].map(Path::new).into_iter().filter(|path| path.exists()) {
        let source = directory.canonicalize().unwrap();
        bed.mounts.push(ResolvedMount::bind(source, directory.to_str().unwrap(), true, None));
    }
    symlink("/proc/self/exe", bed.root.join("link")).unwrap();
    fs::write(bed.root.join("script"), "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(bed.root.join("script"), PermissionsExt::from_mode(0o755)).unwrap();
    Some(bed)
}

/// What an image's libraries would do if a container could run the program file of Kiln.
const ATTACK: [&str; 4] = [
    "--ignored",
    "--exact",
    "--nocapture",
    "runtime::tests::hostile::the_attack_of_one_who_runs_the_program_of_kiln",
];
const REACHED: &str = "the program file of Kiln is within reach";

#[test]
#[ignore = "run by others, in a container, if all is lost"]
fn the_attack_of_one_who_runs_the_program_of_kiln() {
    let (own, kilns) = (fs::metadata("/proc/self/exe").unwrap(), fs::metadata("/kiln").unwrap());
    assert_ne!((own.dev(), own.ino()), (kilns.dev(), kilns.ino()), "{REACHED}");
}

#[test]
fn a_container_cannot_run_the_program_file_of_kiln() {
    for command in ["/proc/self/exe", "/link", "/script", "/proc/1/exe"] {
        let args: Vec<&str> = [command].into_iter().chain(ATTACK).collect();
        for init in [false, true] {
            let Some(mut bed) = bed_with_libraries(&args) else { return };
            bed.record.spec.init = init;
            let got = bed.run();
            assert!(!format!("{got:?}").contains(REACHED), "{command}, init {init}: {got:?}");
        }
        let Some(mut bed) = bed_with_libraries(&["sleep", "60"]) else { return };
        let (streams, _ours) = pipes();
        bed.launch(streams).unwrap();
        let got = bed.exec(&args, |_| {});
        assert!(!format!("{got:?}").contains(REACHED), "{command}, further: {got:?}");
    }
    // It would be told if it were so: here it is, from where it can only be read.
    let args: Vec<&str> = ["/kiln"].into_iter().chain(ATTACK).collect();
    let Some(mut bed) = bed_with_libraries(&args) else { return };
    let got = bed.run();
    assert!(format!("{got:?}").contains(REACHED), "{got:?}");
}

#[test]
fn an_init_has_nothing_that_its_workload_should_not_get_hold_of() {
    let host = tempfile::tempdir().unwrap();
    let script = r#"
        [ /proc/1/exe -ef /kiln ] && echo "the program file of Kiln"
        [ -e "/proc/1/root$OF_HOST" ] && echo "a root of the host's"
        tr -d '\0' </proc/1/environ
        ls -l /proc/1/fd | sed -n 's/.* \([0-9]*\) -> .*/\1/p'
        sed -n 's/^\(CapPrm\|CapBnd\|Seccomp\|NoNewPrivs\):\t0*/\1 /p' /proc/1/status
        exec 5</proc/1/exe
        (: >>/proc/self/fd/5) 2>/dev/null || echo "not to be changed"
    "#;
    let Some(mut bed) = bed_with_libraries(&["sh", "-c", script]) else { return };
    bed.record.spec.init = true;
    bed.record.spec.security.cap_add = own(&["SYS_PTRACE"]);
    bed.record.spec.process.env = vec![format!("OF_HOST={}", host.path().display())];
    let outcome = bed.run().unwrap();
    let expected = "0\n1\n2\nCapPrm 20\nCapBnd 20\nNoNewPrivs 1\nSeccomp 2\nnot to be changed\n";
    assert_eq!(outcome.stdout, expected, "{outcome:?}");
}

#[test]
fn what_only_root_may_execute_is_refused_to_others() {
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["/secret"]) else { return };
        fs::copy(bed.root.join("bin/busybox"), bed.root.join("secret")).unwrap();
        fs::set_permissions(bed.root.join("secret"), PermissionsExt::from_mode(0o700)).unwrap();
        bed.record.spec.process.user = "app".into();
        let refused = |got: &Result<Outcome, _>| match got {
            Err(RuntimeError::CommandNotExecutable { .. }) => true,
            // crun finds this out after it has said that all is well.
            Ok(outcome) => runtime != RuntimeChoice::Native && outcome.stderr.contains("Permission denied"),
            Err(_) => false,
        };
        let got = bed.run();
        assert!(refused(&got), "{runtime:?}: {got:?}");

        let Some(mut bed) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        fs::copy(bed.root.join("bin/busybox"), bed.root.join("secret")).unwrap();
        fs::set_permissions(bed.root.join("secret"), PermissionsExt::from_mode(0o700)).unwrap();
        let (streams, _ours) = pipes();
        bed.launch(streams).unwrap();
        let got = bed.exec(&["/secret"], |exec| exec.user = Some("app".into()));
        assert!(refused(&got), "{runtime:?}, further: {got:?}");
    }
}
