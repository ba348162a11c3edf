//! What a hostile container sees, and gets hold of, when Kiln's own processes come into it.

use std::fs;

use kiln_contract::RuntimeChoice;

use super::bed::{Bed, own, pipes, wait};
use crate::runtime::ResolvedMount;

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
