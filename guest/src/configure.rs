//! Becoming somebody: the first thing of every life.

use kiln_link::Opener;
use kiln_link::message::Configure;

use crate::agent::Machine;
use crate::failure::{Doing as _, Failure, invalid};
use crate::network::Network;
use crate::{identity, mounts, root};

/// Makes this machine what `configure` says. In a live fork the root is there already; only what must differ is changed, and
/// then the workload, which was frozen in another machine, goes on in this one.
pub(crate) async fn configure(machine: &Machine, wanted: &Configure, opener: &Opener) -> Result<(), Failure> {
    identity::check_machine_id(&wanted.machine_id)?;
    identity::assume(wanted)?;
    bring_up_loopback()?;
    for (name, value) in &wanted.sysctls {
        set_sysctl(name, value)?;
    }
    if wanted.network {
        let mut network = machine.network.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*network {
            Some(network) => network.go_on(opener),
            None => *network = Some(Network::start(opener)?),
        }
    }
    let has_root = machine.root().is_some();
    match (&wanted.root, has_root) {
        (Some(new), false) => {
            let made = root::make(new)?;
            mounts::host_files(&made, &wanted.files)?;
            mounts::all(&wanted.mounts, opener, root::MOUNT).await?;
            machine.pid_one.switch_root()?;
            *machine.root() = Some(made);
        }
        (None, true) => {
            if let Some(root) = &*machine.root() {
                mounts::rewrite_host_files(root, &wanted.files)?;
            }
            mounts::again(&wanted.mounts, opener).await?;
            machine.workload.thaw()?;
        }
        (Some(_), true) => return Err(invalid("this machine has a root already")),
        (None, false) => return Err(invalid("this machine has no root yet, and is given none")),
    }
    Ok(())
}

fn set_sysctl(name: &str, value: &str) -> Result<(), Failure> {
    let good = |part: &str| !part.is_empty() && part != "." && part != "..";
    let path = name.replace('.', "/");
    if !path.split('/').all(good) {
        return Err(invalid(format!("`{name}` is no kernel parameter")));
    }
    std::fs::write(format!("/proc/sys/{path}"), value).doing(format_args!("set {name} to `{value}`"))
}

/// `127.0.0.1` and `::1` work in every machine.
fn bring_up_loopback() -> Result<(), Failure> {
    use std::os::fd::AsRawFd as _;
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .doing("make a socket")?;
    // SAFETY: all zeros is a value of this type.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads the name and the flags, both of which are set.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(crate::failure::failed("bring up loopback", std::io::Error::last_os_error()));
    }
    Ok(())
}
