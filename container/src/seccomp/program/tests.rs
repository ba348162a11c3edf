use oci_spec::runtime::{LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSyscallBuilder};

use super::*;
use crate::capabilities::CapabilitySet;
use crate::seccomp::default_policy;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const X86_64: u32 = 0xc000_003e;

/// Runs a program as the kernel does.
fn run(program: &Program, architecture: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![number, architecture, 0, 0];
    data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let one = program.0[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { one.jt } else { one.jf });
        match one.code {
            LOAD => accumulator = data[one.k as usize / 4],
            AND => accumulator &= one.k,
            RETURN => return one.k,
            JUMP => at += one.k as usize,
            IF_EQUAL => at += jump(accumulator == one.k),
            IF_GREATER => at += jump(accumulator > one.k),
            IF_AT_LEAST => at += jump(accumulator >= one.k),
            other => panic!("instruction {other}"),
        }
    }
}

fn default_program(capabilities: u64) -> Program {
    let policy = default_policy::profile().resolve(CapabilitySet::from_bits(capabilities)).unwrap();
    let mut policy = policy;
    // The same on every processor that runs these tests.
    policy.set_architectures(Some(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]));
    Program::compile(&policy).unwrap()
}

#[test]
fn the_default_policy_allows_what_it_names_and_nothing_else() {
    const SYS_ADMIN: u64 = 1 << 21;
    let numbers = x86_64();
    let call = |name| numbers[name];
    let namespace = libc::CLONE_NEWUSER as u64;
    let cases: [(&str, u64, u64, u32); 17] = [
        ("read", 0, 0, ALLOW),
        ("writev", 0, 0, ALLOW),
        ("mount", 0, 0, ERRNO | 1),
        ("mount", SYS_ADMIN, 0, ALLOW),
        ("unshare", 0, 0, ERRNO | 1),
        ("io_uring_setup", SYS_ADMIN, 0, ERRNO | 1),
        ("keyctl", 0, 0, ERRNO | 1),
        ("clone", 0, 0x11, ALLOW),
        ("clone", 0, namespace | 0x11, ERRNO | 1),
        ("clone", SYS_ADMIN, namespace, ALLOW),
        ("clone3", 0, 0, ERRNO | 38),
        ("clone3", SYS_ADMIN, 0, ALLOW),
        ("socket", 0, 2, ALLOW),
        ("socket", 0, 40, ERRNO | 1),
        ("socket", 0, 1 << 32 | 40, ERRNO | 1),
        ("personality", 0, 8, ALLOW),
        ("personality", 0, 9, ERRNO | 1),
    ];
    for (name, capabilities, argument, expected) in cases {
        let result = run(&default_program(capabilities), X86_64, call(name), [argument, 0, 0, 0, 0, 0]);
        assert_eq!(result, expected, "{name} {argument:#x} with {capabilities:#x}: {result:#x}");
    }
}

#[test]
fn other_architectures_have_their_own_numbers_or_are_killed() {
    let program = default_program(0);
    // 40 is rmdir for 32-bit programs, sendfile for others; 21 is mount and access.
    assert_eq!(run(&program, 0x4000_0003, 21, [0; 6]), ERRNO | 1);
    assert_eq!(run(&program, X86_64, 21, [0; 6]), ALLOW);
    assert_eq!(run(&program, 0xc000_00b7, 63, [0; 6]), KILL);
    // x32: read.
    assert_eq!(run(&program, X86_64, 0x4000_0000, [0; 6]), ERRNO | 1);
    assert_eq!(run(&program, X86_64, u32::MAX, [0; 6]), ERRNO | 1);
}

#[test]
fn the_program_is_short() {
    let length = default_program(0).0.len();
    assert!(length < 500, "{length} instructions");
}

#[test]
fn arguments_are_compared_with_all_their_bits() {
    use LinuxSeccompOperator as Op;
    let big = 5_u64 << 32 | 7;
    let values = [0, 7, 8, 5 << 32, big - 1, big, big + 1, 6 << 32, u64::MAX];
    type Holds = fn(u64, u64) -> bool;
    let operators: [(Op, Holds); 6] = [
        (Op::ScmpCmpEq, |a, b| a == b),
        (Op::ScmpCmpNe, |a, b| a != b),
        (Op::ScmpCmpGt, |a, b| a > b),
        (Op::ScmpCmpGe, |a, b| a >= b),
        (Op::ScmpCmpLt, |a, b| a < b),
        (Op::ScmpCmpLe, |a, b| a <= b),
    ];
    for (operator, holds) in operators {
        let program = with_rules(&[(operator, big, 0)]);
        for value in values {
            let expected = if holds(value, big) { ALLOW } else { KILL };
            assert_eq!(run(&program, X86_64, 9, [0, value, 0, 0, 0, 0]), expected, "{value:#x} {operator}");
        }
    }
    let program = with_rules(&[(Op::ScmpCmpMaskedEq, 0xf_0000_000f, 5 << 32 | 7), (Op::ScmpCmpNe, 0, 0)]);
    assert_eq!(run(&program, X86_64, 9, [0, 0xa5_0000_00a7, 0, 0, 0, 0]), ALLOW);
    assert_eq!(run(&program, X86_64, 9, [0, 0xa5_0000_00a6, 0, 0, 0, 0]), KILL);
}

/// Call 9 is allowed if its second argument fits; everything else kills.
fn with_rules(rules: &[(LinuxSeccompOperator, u64, u64)]) -> Program {
    let args: Vec<_> = rules
        .iter()
        .map(|(op, value, two)| {
            LinuxSeccompArgBuilder::default()
                .index(1_usize)
                .op(*op)
                .value(*value)
                .value_two(*two)
                .build()
                .unwrap()
        })
        .collect();
    let rule = LinuxSyscallBuilder::default()
        .names(["mmap".to_owned()])
        .action(LinuxSeccompAction::ScmpActAllow)
        .args(args);
    let policy = LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActKillProcess)
        .architectures([Arch::ScmpArchX86_64])
        .syscalls([rule.build().unwrap()])
        .build()
        .unwrap();
    Program::compile(&policy).unwrap()
}

#[test]
fn every_processor_has_the_calls_that_no_program_can_do_without() {
    for (name, numbers) in [("x86_64", x86_64()), ("aarch64", aarch64()), ("x86", x86()), ("arm", arm())] {
        for call in ["read", "write", "execve", "exit_group", "openat", "mmap", "futex"] {
            let call = if call == "mmap" && name == "arm" { "mmap2" } else { call };
            assert!(numbers.contains_key(call), "{call} on {name}");
        }
    }
    assert_eq!(aarch64()["newfstatat"], 79);
}
