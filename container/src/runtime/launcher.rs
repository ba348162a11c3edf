//! The last program of Kiln's in a container, from which a process becomes the workload.
//!
//! Why there is one, and what it does, is said where it is written: `container/launcher/main.rs`. Here it is carried,
//! put into sealed memory for each start, and given its orders; and its reports are read.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::pipe::{PipeFlags, pipe_with};

use super::privileges::{self, exit};
use super::{NATIVE, RuntimeError};
use crate::capabilities::CapabilitySet;
use crate::seccomp::Program;
use crate::spec::ProcessPlan;

/// The program: a static one of one page.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/launcher"));

/// The descriptors that it knows.
const ORDERS: RawFd = 3;
const REPORT: RawFd = 4;
const TOLD: RawFd = 5;

const NO_PROGRAMS_IN_MEMORY: &str = "this host runs no programs from memory, and every container begins with one: \
    set vm.memfd_noexec to 1 (sysctl vm.memfd_noexec=1)";

/// Flags of its orders.
const CHILD: u32 = 1;
const TERMINAL: u32 = 2;
const INIT: u32 = 4;

/// What the process that runs the launcher does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'a> {
    /// It becomes the command.
    Command {
        /// Where errors go; it is closed when the command runs.
        report: BorrowedFd<'a>,
    },
    /// A child of this process's parent becomes the command. This process tells its number, and ends.
    Child {
        /// Where errors go; it is closed when the command runs.
        report: BorrowedFd<'a>,
        /// Where the number goes: four bytes, in the processor's order.
        told: BorrowedFd<'a>,
        /// Standard input is a terminal, to be the child's controlling one.
        terminal: bool,
    },
    /// There is no command: this process reaps, and passes signals on, until this child of its own ends, and then ends
    /// as that did.
    Init {
        /// The child.
        child: i32,
        /// Closed when this process has nothing of Kiln's any more, and is confined.
        ready: BorrowedFd<'a>,
    },
}

impl<'a> Part<'a> {
    fn report(self) -> Option<BorrowedFd<'a>> {
        match self {
            Self::Command { report } | Self::Child { report, .. } => Some(report),
            Self::Init { .. } => None,
        }
    }

    fn told(self) -> Option<BorrowedFd<'a>> {
        match self {
            Self::Child { told, .. } | Self::Init { ready: told, .. } => Some(told),
            Self::Command { .. } => None,
        }
    }
}

/// A command, and the launcher that becomes it.
#[derive(Debug)]
pub(super) struct Launcher {
    program: OwnedFd,
    args: Vec<CString>,
    env: Vec<CString>,
    seccomp: Option<Program>,
    no_new_privileges: bool,
}

impl Launcher {
    /// The command of `plan`, to be confined by `seccomp`. Descriptors are closed when another program is run.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`] where the kernel runs no programs from memory (`vm.memfd_noexec=2`).
    pub(super) fn new(plan: &ProcessPlan, seccomp: Option<Program>) -> Result<Self, RuntimeError> {
        let text = |text: &String| {
            CString::new(text.as_str()).map_err(|_| {
                RuntimeError::Invalid(format!("`{}` has a NUL byte in it", text.replace('\0', "\\0")))
            })
        };
        Ok(Self {
            program: sealed_program().map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => RuntimeError::Unsupported(NO_PROGRAMS_IN_MEMORY.into()),
                _ => RuntimeError::System { doing: "put the launcher into memory", source },
            })?,
            args: plan.args.iter().map(text).collect::<Result<_, _>>()?,
            env: plan.env.iter().map(text).collect::<Result<_, _>>()?,
            seccomp,
            no_new_privileges: plan.no_new_privileges,
        })
    }

    /// Gives up all capabilities but `keep`, and plays its part; what goes wrong is reported. Whoever calls this is a
    /// process of one thread, is the workload's user, and sees nothing but the container.
    ///
    /// Without `no_new_privs` the kernel wants `CAP_SYS_ADMIN` for a filter: it is loaded here then, and must allow what
    /// is left to do. Otherwise the launcher loads it, as late as it can.
    pub(super) fn run(&self, part: Part<'_>, keep: CapabilitySet) -> ! {
        let filter = self.seccomp.as_ref();
        let (now, later) = if self.no_new_privileges { (None, filter) } else { (filter, None) };
        // Nobody asks why an init could not be: that its child ends with it tells enough.
        let failed = |to: Option<BorrowedFd<'_>>, doing: &str, error: &io::Error| -> ! {
            if let Some(to) = to {
                report(to, &format!("cannot {doing}: {error}"));
            }
            exit(126)
        };
        let program = orders(part, later)
            .and_then(|orders| self.arrange(part, orders))
            .unwrap_or_else(|error| failed(part.report(), "give the launcher its orders", &error));
        // SAFETY: it was put there just now, and is open until this process ends.
        let to = part.report().map(|_| unsafe { BorrowedFd::borrow_raw(REPORT) });
        if let Some(Err(error)) = now.map(Program::load) {
            failed(to, "load the system call filter", &error);
        }
        if let Err(error) = privileges::keep_only(keep) {
            failed(to, "give up capabilities", &error);
        }
        let (its_args, its_env): (&[CString], &[CString]) = match part {
            Part::Init { .. } => (&[c"init".to_owned()], &[]),
            Part::Command { .. } | Part::Child { .. } => (&self.args, &self.env),
        };
        let pointers = |texts: &[CString]| {
            texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (args, env) = (pointers(its_args), pointers(its_env));
        // SAFETY: both arrays end with null and point to texts that outlive the call, as does the empty path.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                program.as_raw_fd(),
                c"".as_ptr(),
                args.as_ptr(),
                env.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        failed(to, "run the launcher", &io::Error::last_os_error())
    }

    /// Puts the launcher's descriptors where it looks for them, and has all others closed when it runs. Gives the
    /// launcher itself.
    fn arrange(&self, part: Part<'_>, orders: OwnedFd) -> io::Result<OwnedFd> {
        // Never closed by hand: its number may soon be that of another.
        let orders = ManuallyDrop::new(orders);
        let wanted = [(ORDERS, Some(orders.as_fd())), (REPORT, part.report()), (TOLD, part.told())];
        // First out of the way: each may have the number that another is to get.
        let program = fcntl_dupfd_cloexec(&self.program, TOLD + 1)?;
        let copies = wanted.map(|(number, fd)| (number, fd.map(|fd| fcntl_dupfd_cloexec(fd, TOLD + 1))));
        for (number, copy) in copies {
            let Some(copy) = copy.transpose()? else {
                // SAFETY: what has this number is not used by anything in this process any more.
                unsafe { libc::close(number) };
                continue;
            };
            // SAFETY: as above.
            if unsafe { libc::dup2(copy.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // Whatever the caller of this command had open and did not mark so itself.
        let (first, last) = (TOLD.cast_unsigned() + 1, libc::c_uint::MAX);
        // SAFETY: takes numbers only.
        match unsafe { libc::close_range(first, last, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } {
            0 => Ok(program),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The program in memory that nobody can change any more.
fn sealed_program() -> io::Result<OwnedFd> {
    let name = "kiln-launcher";
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = match memfd_create(name, flags | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know the flag, and lets every such file be run.
        Err(Errno::INVAL) => memfd_create(name, flags)?,
        other => other?,
    };
    let mut file = File::from(memory);
    file.write_all(PROGRAM)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// A pipe that holds what the launcher reads first: flags, a process, the number of instructions and the instructions
/// of a filter. A pipe takes 64 KiB without a reader, and this is half of that at the most.
fn orders(part: Part<'_>, filter: Option<&Program>) -> io::Result<OwnedFd> {
    let (flags, child) = match part {
        Part::Command { .. } => (0, 0),
        Part::Child { terminal: false, .. } => (CHILD, 0),
        Part::Child { terminal: true, .. } => (CHILD | TERMINAL, 0),
        Part::Init { child, .. } => (INIT, child),
    };
    let filter = filter.map(Program::bytes).unwrap_or_default();
    let mut bytes = Vec::with_capacity(16 + filter.len());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(child.to_ne_bytes());
    bytes.extend((filter.len() as u64 / Program::INSTRUCTION).to_ne_bytes());
    bytes.extend(filter);
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    File::from(writer).write_all(&bytes)?;
    Ok(reader)
}

/// How errors before the launcher's own begin: then comes their text.
const TEXT: u8 = b'E';

/// Writes an error for [`read_report`]. Nothing can be done if that fails: the process ends all the same.
pub(super) fn report(to: BorrowedFd<'_>, text: &str) {
    if let Ok(copy) = to.try_clone_to_owned() {
        let _ = File::from(copy).write_all(&[&[TEXT], text.as_bytes()].concat());
    }
}

/// The longest report that is read: who may look into the process in between may write to the pipe too.
const LONGEST_REPORT: u64 = 16 << 10;

/// Reads what a process of `command` reported until it became its command; `doing` says what was being done to the
/// container.
///
/// # Errors
/// What it reported.
pub(super) fn read_report(report: OwnedFd, command: &str, doing: &'static str) -> Result<(), RuntimeError> {
    let mut bytes = Vec::new();
    File::from(report).take(LONGEST_REPORT).read_to_end(&mut bytes).map_err(|source| {
        RuntimeError::System { doing: "read what the container's process reports", source }
    })?;
    let Some((&kind, rest)) = bytes.split_first() else { return Ok(()) };
    let system = || {
        let number = rest.first_chunk().map_or(libc::EIO, |bytes| i32::from_ne_bytes(*bytes));
        io::Error::from_raw_os_error(number)
    };
    let executable = |reason: &str| RuntimeError::CommandNotExecutable {
        command: command.to_owned(),
        reason: reason.to_owned(),
    };
    let failed = |reason| RuntimeError::Runtime { runtime: NATIVE.into(), doing, reason };
    let cannot = |doing: &str, error: io::Error| failed(format!("cannot {doing}: {error}"));
    Err(match kind {
        b'N' => RuntimeError::CommandNotFound { command: command.to_owned() },
        b'D' => executable("it is a directory"),
        b'I' => executable("the interpreter that it names is not in the container"),
        b'X' => match system().raw_os_error() {
            Some(libc::EACCES) => executable("permission denied"),
            Some(libc::ENOEXEC) => executable(
                "it is neither a program for this processor nor a script that names its interpreter",
            ),
            _ => executable(&system().to_string()),
        },
        b'O' => cannot("read the launcher's orders", system()),
        b'F' => cannot("load the system call filter", system()),
        b'C' => match system() {
            error if error.raw_os_error() == Some(libc::EAGAIN) => {
                failed("it has as many processes as it may have".into())
            }
            error => cannot("make a process", error),
        },
        b'T' => cannot("make the terminal the process's own", system()),
        _ => failed(String::from_utf8_lossy(rest).into_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_come_back_as_the_errors_that_decide_exit_codes() {
        let read = |bytes: &[u8]| {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            File::from(writer).write_all(bytes).unwrap();
            read_report(reader, "cmd", "start")
        };
        let number = |kind: u8, number: i32| [&[kind][..], &number.to_ne_bytes()].concat();
        assert!(read(b"").is_ok());
        let missing = read(&number(b'N', libc::ENOENT));
        assert!(matches!(missing, Err(RuntimeError::CommandNotFound { command }) if command == "cmd"));
        let table = [
            (number(b'D', libc::EACCES), "it is a directory"),
            (number(b'X', libc::EACCES), "permission denied"),
            (number(b'X', libc::ENOEXEC), "neither a program"),
            (number(b'X', libc::E2BIG), "Argument list too long"),
            (number(b'I', libc::ENOENT), "interpreter"),
            (b"X".to_vec(), "Input/output error"),
        ];
        for (bytes, expected) in table {
            let got = read(&bytes);
            assert!(
                matches!(&got, Err(RuntimeError::CommandNotExecutable { reason, .. }) if reason.contains(expected)),
                "{expected}: {got:?}"
            );
        }
        for (bytes, expected) in [
            (b"Ewhy".to_vec(), "why"),
            (number(b'C', libc::EAGAIN), "as many processes as it may have"),
            (number(b'F', libc::EFAULT), "filter: Bad address"),
        ] {
            let got = read(&bytes).unwrap_err().to_string();
            assert!(got.starts_with("Kiln cannot start the container: "), "{got}");
            assert!(got.contains(expected), "{got}");
        }
    }

    #[test]
    fn a_report_without_end_is_not_read_without_end() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let writing = std::thread::spawn(move || while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {});
        assert!(read_report(reader, "cmd", "start").is_err());
        writing.join().unwrap();
    }

    #[test]
    fn the_program_in_memory_cannot_be_changed() {
        let program = sealed_program().unwrap();
        let path = format!("/proc/self/fd/{}", program.as_raw_fd());
        let mut again = File::options().write(true).open(path).unwrap();
        assert_eq!(again.write(b"x").unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(again.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
