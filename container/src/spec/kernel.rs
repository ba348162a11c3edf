//! Kernel settings and control group limits of a container.

use std::collections::HashMap;

use kiln_contract::{ByteSize, InstanceSpec};
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroup, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use super::builder;
use crate::devices::Devices;
use crate::host;
use crate::runtime::{NetworkNamespace, RuntimeError};

/// Settings of the IPC namespace, which every container has for itself (`ipc_namespaces(7)`).
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// The settings that a container asks for, and those that Docker gives every container with a network of its own:
/// ports below 1024 and `ping` for every user.
///
/// # Errors
/// [`RuntimeError::Invalid`] for a setting that is not the container's own and would change the host.
pub(super) fn sysctls(
    spec: &InstanceSpec,
    network: &NetworkNamespace,
    user_namespace: bool,
) -> Result<HashMap<String, String>, RuntimeError> {
    let mut sysctls = HashMap::new();
    let own_network = *network == NetworkNamespace::New;
    if own_network {
        // Group numbers that are not mapped are refused by the kernel.
        let last = if user_namespace { host::mapped_groups().saturating_sub(1) } else { i32::MAX as u32 };
        sysctls.insert("net.ipv4.ping_group_range".to_owned(), format!("0 {last}"));
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
    }
    for (name, value) in &spec.security.sysctls {
        let name = name.replace('/', ".");
        let of_network = name.starts_with("net.");
        if of_network && !own_network {
            return Err(RuntimeError::Invalid(format!(
                "cannot set `{name}`: the container has no network namespace of its own"
            )));
        }
        if !of_network && !IPC.contains(&name.as_str()) && !name.starts_with("fs.mqueue.") {
            return Err(RuntimeError::Invalid(format!(
                "cannot set `{name}`: it is the whole host's, not a container's"
            )));
        }
        if name.split('.').any(|part| part.is_empty() || part == "..") {
            return Err(RuntimeError::Invalid(format!("`{name}` is not a kernel setting")));
        }
        sysctls.insert(name, value.clone());
    }
    Ok(sysctls)
}

/// The limits, for runtimes that make the control group themselves.
///
/// # Errors
/// [`RuntimeError::Invalid`] for numbers out of range.
pub(super) fn resources(spec: &InstanceSpec, devices: &Devices) -> Result<LinuxResources, RuntimeError> {
    let wanted = &spec.resources;
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let mut resources = LinuxResourcesBuilder::default().build().map_err(builder)?;
    if let Some(limit) = wanted.memory {
        let swap = wanted.memory_swap.map_or(limit.bytes().saturating_mul(2), ByteSize::bytes);
        let memory = LinuxMemoryBuilder::default().limit(signed(limit.bytes())).swap(signed(swap));
        resources.set_memory(Some(memory.build().map_err(builder)?));
    }
    let mut cpu = LinuxCpuBuilder::default().build().map_err(builder)?;
    if let Some(cpus) = wanted.cpus {
        cpu.set_period(Some(100_000)).set_quota(Some(i64::from(cpus.millis) * 100));
    }
    cpu.set_shares(wanted.cpu_shares).set_cpus(wanted.cpuset.clone());
    resources.set_cpu(Some(cpu));
    if let Some(pids) = wanted.pids.filter(|pids| *pids > 0) {
        resources.set_pids(Some(LinuxPidsBuilder::default().limit(pids).build().map_err(builder)?));
    }
    if let Some(rules) = &devices.rules {
        let mut all = LinuxDeviceCgroup::default();
        all.set_allow(false).set_typ(None).set_access(Some("rwm".to_owned()));
        resources.set_devices(Some([vec![all], rules.clone()].concat()));
    }
    Ok(resources)
}
