//! Which devices a container may use, on v2: a program that the kernel asks whenever one is opened or made.
//!
//! v1 has a controller with files for this; v2 has `BPF_PROG_TYPE_CGROUP_DEVICE` (linux/bpf.h), of which an attached
//! program holds for a group and all below it, and goes with it. It gets
//!
//! ```text
//! 0  u32  kind (1 block, 2 character) | access << 16 (1 make, 2 read, 4 write)
//! 4  u32  major
//! 8  u32  minor
//! ```
//! and returns 1 to allow. Rules are tried in order; what none of them allows is denied.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Programs of groups above stay in force.
const ALLOW_MULTI: u32 = 2;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
/// All kinds of access.
const ANY: i32 = 7;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// The destination in the lower half, the source in the upper: the order on little-endian processors.
    registers: u8,
    offset: i16,
    value: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, value: i32) -> Instruction {
    Instruction { code, registers, offset, value }
}

/// Registers: 1 has the address of what is asked, later the access that a rule does not give; 2 the kind, 3 the access,
/// 4 the major and 5 the minor number; 0 is the answer.
const LOAD: [Instruction; 6] = [
    instruction(0x61, 0x12, 0, 0),      // r2 = u32 at r1 + 0
    instruction(0xbf, 0x23, 0, 0),      // r3 = r2
    instruction(0x57, 0x02, 0, 0xffff), // r2 &= 0xffff
    instruction(0x77, 0x03, 0, 16),     // r3 >>= 16
    instruction(0x61, 0x14, 4, 0),      // r4 = u32 at r1 + 4
    instruction(0x61, 0x15, 8, 0),      // r5 = u32 at r1 + 8
];

const fn answer(value: i32) -> [Instruction; 2] {
    [instruction(0xb7, 0, 0, value), instruction(0x95, 0, 0, 0)]
}

/// Goes on `skip` instructions further if the register is not `value`.
fn unless(register: u8, value: i32, skip: usize) -> Instruction {
    instruction(0x55, register, i16::try_from(skip).unwrap_or(i16::MAX), value)
}

/// What each rule that allows something checks before it answers.
fn checks(rule: &LinuxDeviceCgroup) -> Vec<(u8, i32)> {
    let mut checks = Vec::new();
    match rule.typ() {
        Some(LinuxDeviceType::B) => checks.push((2, BLOCK)),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => checks.push((2, CHARACTER)),
        _ => {}
    }
    let number = |number: i64| i32::try_from(number).unwrap_or(-1);
    checks.extend(rule.major().map(|major| (4, number(major))));
    checks.extend(rule.minor().map(|minor| (5, number(minor))));
    checks
}

fn access(rule: &LinuxDeviceCgroup) -> i32 {
    let letters = rule.access().as_deref().unwrap_or("rwm");
    let bit = |letter: char| match letter {
        'm' => 1,
        'r' => 2,
        'w' => 4,
        _ => 0,
    };
    letters.chars().fold(0, |bits, letter| bits | bit(letter))
}

fn program(rules: &[LinuxDeviceCgroup]) -> Vec<Instruction> {
    let mut program = LOAD.to_vec();
    for rule in rules.iter().filter(|rule| rule.allow()) {
        let mut body: Vec<(Option<Instruction>, (u8, i32))> =
            checks(rule).into_iter().map(|check| (None, check)).collect();
        if access(rule) != ANY {
            // What is asked for beside what the rule gives must be nothing.
            body.push((Some(instruction(0xbf, 0x31, 0, 0)), (1, 0)));
        }
        let length = |(before, _): &(Option<Instruction>, _)| 1 + 2 * usize::from(before.is_some());
        let mut left = body.iter().map(length).sum::<usize>() + answer(1).len();
        for step in body {
            left -= length(&step);
            let (before, (register, value)) = step;
            if let Some(copy) = before {
                program.extend([copy, instruction(0x57, register, 0, ANY & !access(rule))]);
            }
            program.push(unless(register, value, left));
        }
        program.extend(answer(1));
    }
    program.extend(answer(0));
    program
}

/// Lets processes in the group at `directory`, and below it, use what `rules` allow and no other device.
///
/// # Errors
/// The kernel has no such programs (`CONFIG_CGROUP_BPF`), or this process may not load any.
pub(super) fn attach(directory: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    #[repr(C)]
    struct Load {
        kind: u32,
        length: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        version_and_flags: [u32; 2],
        name: [u8; 16],
        interface_and_attach_type: [u32; 2],
    }
    #[repr(C)]
    struct Attach {
        group: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let instructions = program(rules);
    let mut name = [0; 16];
    name[..12].copy_from_slice(b"kiln_devices");
    let load = Load {
        kind: TYPE_CGROUP_DEVICE,
        length: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 2],
        version_and_flags: [0; 2],
        name,
        interface_and_attach_type: [0, ATTACH_CGROUP_DEVICE],
    };
    let group = File::open(directory)?;
    // SAFETY: `load` has the layout of `union bpf_attr` for this command, and what it points to outlives the call; the
    // descriptor that comes back is nobody else's.
    let program = unsafe { OwnedFd::from_raw_fd(bpf(PROG_LOAD, &load)?) };
    let attach = Attach {
        group: group.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: `attach` has the layout of `union bpf_attr` for this command; both descriptors are open.
    unsafe { bpf(PROG_ATTACH, &attach) }.map(drop)
}

/// `bpf(2)`.
///
/// # Safety
/// `attributes` must have the layout that `command` reads, and what it points to must be there.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads no more than the size that it is given; the rest is the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> i64 {
        let words = [i64::from(kind | access << 16), i64::from(major), i64::from(minor)];
        let mut registers = [0_i64; 6];
        let mut at = 0_usize;
        loop {
            let Instruction { code, registers: pair, offset, value } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            match code {
                0x61 => registers[to] = words[offset as usize / 4],
                0xbf => registers[to] = registers[from],
                0xb7 => registers[to] = value.into(),
                0x57 => registers[to] &= i64::from(value),
                0x77 => registers[to] >>= value,
                0x55 if registers[to] != i64::from(value) => at += offset as usize,
                0x55 => {}
                0x95 => return registers[0],
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn a_device_may_be_used_as_some_rule_says_and_no_further() {
        let devices = crate::devices::resolve(&["/dev/full:/dev/disk:r".to_owned()], false).unwrap();
        let program = program(&devices.rules.unwrap());
        let (make, read, write) = (1, 2, 4);
        for (kind, access, major, minor, allowed) in [
            (CHARACTER, read | write, 1, 3, true),
            (CHARACTER, read | write | make, 1, 9, true),
            (CHARACTER, write, 136, 1234, true),
            (BLOCK, read, 1, 3, false),
            (CHARACTER, read, 1, 11, false),
            (CHARACTER, read, 3, 1, false),
            (BLOCK, read, 254, 0, false),
            (BLOCK, make, 254, 0, true),
            (CHARACTER, make, 1, 11, true),
            (CHARACTER, make | read, 1, 11, false),
        ] {
            let got = run(&program, kind, access, major, minor);
            assert_eq!(got, i64::from(allowed), "kind {kind} access {access} {major}:{minor}");
        }
    }

    #[test]
    fn a_rule_without_numbers_and_with_part_of_the_access_gives_that_part() {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(LinuxDeviceType::B))
            .set_major(Some(8))
            .set_access(Some("rw".into()));
        let program = program(&[rule]);
        for (access, minor, allowed) in [(2, 0, 1), (4, 15, 1), (6, 1, 1), (1, 0, 0), (7, 0, 0)] {
            assert_eq!(run(&program, BLOCK, access, 8, minor), allowed, "{access} {minor}");
        }
        assert_eq!(run(&program, BLOCK, 2, 9, 0), 0);
    }
}
