//! The guest: what runs in a machine besides its workload.
//!
//! 1. The kernel starts it as PID 1 from the initramfs. [`init`] mounts the basics, loads the modules that the host listed,
//!    starts the [`agent`] as a second process, and from then on only reaps and does what must be done by PID 1.
//! 2. The agent opens the [`port`] to the host and parks: here a template is saved. Nothing so far depends on the image, the
//!    name or the network.
//! 3. The host begins a life and says who the machine is: [`configure`] seeds the random generator, sets clock and names, makes
//!    the [`root`], and both processes move into it.
//! 4. [`process`]es are started ([`spawn`]), their streams carried; [`control`] answers the rest.
//! 5. Before the machine is saved again, the workload is frozen in its control group ([`cgroup`]), so that a copy runs
//!    nothing before step 3 was done for it.
//!
//! Each connection to the machine's [`ssh`] server is a process of its own, so that nothing of it is left when it ends, and
//! nothing in it can harm the agent; files are carried by a further one, which runs as their user.
//!
//! It is in every machine's memory, so it is small, and has one thread.

#![cfg_attr(
    not(target_os = "linux"),
    allow(unused, reason = "a guest is Linux; elsewhere it is only looked at by tools")
)]

#[cfg(target_os = "linux")]
mod agent;
#[cfg(target_os = "linux")]
mod archive;
#[cfg(target_os = "linux")]
mod cgroup;
#[cfg(target_os = "linux")]
mod configure;
#[cfg(target_os = "linux")]
mod control;
#[cfg(target_os = "linux")]
mod disks;
#[cfg(target_os = "linux")]
mod failure;
#[cfg(target_os = "linux")]
mod identity;
#[cfg(target_os = "linux")]
mod init;
#[cfg(target_os = "linux")]
mod layer;
#[cfg(target_os = "linux")]
mod modules;
#[cfg(target_os = "linux")]
mod mounts;
#[cfg(target_os = "linux")]
mod network;
#[cfg(target_os = "linux")]
mod port;
#[cfg(target_os = "linux")]
mod process;
#[cfg(target_os = "linux")]
mod ready;
#[cfg(target_os = "linux")]
mod root;
#[cfg(target_os = "linux")]
mod spawn;
#[cfg(target_os = "linux")]
mod ssh;
#[cfg(target_os = "linux")]
mod stats;
#[cfg(target_os = "linux")]
mod told;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    let argument = std::env::args_os().nth(1).unwrap_or_default();
    if argument == agent::ARGUMENT {
        agent::main()
    } else if argument == ssh::ARGUMENT {
        ssh::main()
    } else if argument == ssh::FILES_ARGUMENT {
        ssh::serve_files()
    } else if std::process::id() == 1 {
        init::main()
    } else {
        use std::io::Write as _;
        let _ = writeln!(
            std::io::stderr(),
            "this program is the first process of a machine and runs nowhere else"
        );
        std::process::ExitCode::from(2)
    }
}

#[cfg(not(target_os = "linux"))]
fn main() {}
