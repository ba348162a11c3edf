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
    for (name, value) in &wanted.sysctls {
        set_sysctl(name, value)?;
    }
    let ready = machine.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    match (&wanted.root, ready) {
        (Some(new), Some(ready)) => {
            if wanted.network {
                *machine.network() = Some(Network::start(ready.network, opener));
            }
            let made = root::make(new, ready.root)?;
            mounts::host_files(&made, &wanted.files)?;
            mounts::all(&wanted.mounts, opener, root::MOUNT).await?;
            machine.pid_one.switch_root()?;
            *machine.root() = Some(made);
        }
        (None, None) => {
            if let Some(network) = &*machine.network() {
                network.go_on(opener);
            }
            if let Some(root) = &*machine.root() {
                mounts::rewrite_host_files(root, &wanted.files)?;
            }
            mounts::again(&wanted.mounts, opener).await?;
            machine.workload.thaw()?;
        }
        (Some(_), None) => return Err(invalid("this machine has a root already")),
        (None, Some(_)) => return Err(invalid("this machine has no root yet, and is given none")),
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
