//! Becoming somebody: the first thing of every life.

use kiln_link::Opener;
use kiln_link::message::{Configure, Root};

use crate::agent::Machine;
use crate::failure::{Doing as _, Failure, invalid};
use crate::network::{self, Network};
use crate::{identity, mounts, root};

/// Makes this machine what `configure` says. In a live fork the root is somebody's already; only what must differ is changed,
/// and then the workload, which was frozen in another machine, goes on in this one.
pub(crate) async fn configure(machine: &Machine, wanted: &Configure, opener: &Opener) -> Result<(), Failure> {
    identity::check_machine_id(&wanted.machine_id)?;
    identity::assume(wanted)?;
    for (name, value) in &wanted.sysctls {
        set_sysctl(name, value)?;
    }
    if let Some(device) = &wanted.device {
        network::assume(device)?;
    }
    let is_somebodys = machine.root().as_ref().is_some_and(|root| !root.is_nobodys);
    match (&wanted.root, is_somebodys) {
        (Some(new), false) => begin(machine, new, wanted, opener).await?,
        (None, true) => {
            if let Some(network) = &*machine.network() {
                network.go_on(opener);
            }
            mounts::again(&wanted.mounts, files(machine, wanted)?, opener).await?;
        }
        (Some(_), true) => return Err(invalid("this machine has a root already")),
        (None, false) => return Err(invalid("this machine has no root yet, and is given none")),
    }
    // It was frozen if the machine was saved.
    machine.workload.thaw()
}

/// Becomes somebody for the first time.
async fn begin(machine: &Machine, new: &Root, wanted: &Configure, opener: &Opener) -> Result<(), Failure> {
    if let Some(device) = machine.ready.take_network().filter(|_| wanted.network) {
        *machine.network() = Some(Network::start(device, opener));
    }
    if machine.root().is_none() {
        let files: Vec<_> = wanted.files.iter().map(|file| file.path.clone()).collect();
        make_root(machine, &files, Some(new.disk_size))?;
    }
    if let Some(root) = &mut *machine.root() {
        root.become_somebodys(new, &machine.workload)?;
        if new.system {
            mounts::files_of_system(root, &wanted.files)?;
        }
    }
    mounts::all(&wanted.mounts, files(machine, wanted)?, opener).await?;
    if new.read_only { root::make_read_only() } else { Ok(()) }
}

/// Makes the root for whoever this machine will be, with everything on its disk that it has to have there.
pub(crate) fn prepare(machine: &Machine, files: &[String]) -> Result<(), Failure> {
    make_root(machine, files, None)?;
    match &*machine.root() {
        Some(root) => rustix::fs::syncfs(&root.disk).doing("write to the disk"),
        None => Ok(()),
    }
}

/// Does what [`configure`] does to a machine whose root is prepared, and leaves it as nobody's: so that the hypervisor, if it
/// translates what is executed, has done so before somebody waits for it. What is drawn and what the clock shows in between is
/// seen by nobody, and both are set again.
pub(crate) fn rehearse(machine: &Machine, wanted: &Configure) -> Result<(), Failure> {
    let root = machine.root();
    let root = root.as_ref().filter(|root| root.is_nobodys);
    let root = root.ok_or_else(|| invalid("only a machine that is prepared and nobody yet can rehearse"))?;
    identity::check_machine_id(&wanted.machine_id)?;
    let uname = rustix::system::uname();
    let hostname = uname.nodename().to_string_lossy().into_owned();
    identity::assume(&Configure { hostname, ..wanted.clone() })?;
    mounts::write_host_files(root, &wanted.files)?;
    mounts::empty_host_files(root, &wanted.files)?;
    machine.workload.thaw()
}

fn make_root(machine: &Machine, files: &[String], disk_size: Option<u64>) -> Result<(), Failure> {
    let parts = machine.ready.take_root().ok_or_else(|| invalid("this machine has a root already"))?;
    let made = root::make(parts, disk_size)?;
    mounts::host_files(&made, files)?;
    machine.pid_one.switch_root()?;
    *machine.root() = Some(made);
    Ok(())
}

/// Writes the files that the host decides; the directory that they are in.
fn files(machine: &Machine, wanted: &Configure) -> Result<String, Failure> {
    match &*machine.root() {
        Some(root) => {
            mounts::write_host_files(root, &wanted.files)?;
            Ok(root::descriptor(&root.files))
        }
        None => Err(invalid("this machine has no root")),
    }
}

fn set_sysctl(name: &str, value: &str) -> Result<(), Failure> {
    let good = |part: &str| !part.is_empty() && part != "." && part != "..";
    let path = name.replace('.', "/");
    if !path.split('/').all(good) {
        return Err(invalid(format!("`{name}` is no kernel parameter")));
    }
    std::fs::write(format!("/proc/sys/{path}"), value).doing(format_args!("set {name} to `{value}`"))
}
