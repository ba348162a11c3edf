//! Containers as a kind of instances.

use kiln_contract::{BackendError, InstanceId, InstanceRecord, Isolation, NetworkBackend, RuntimeChoice};
use kiln_instance::{Ground, Hold, Instances, Kind, Kinds, Volumes, is_of_this_boot};
use kiln_net::ContainerNetwork;

use crate::cgroup::{self, Cgroup};
use crate::ground::ContainerGround;
use crate::{host, runtime};

/// Workloads in namespaces of this kernel.
#[derive(Debug, Clone, Copy)]
pub struct ContainerKind;

/// Containers alone: for a program that runs nothing else.
pub const KINDS: Kinds = &[&ContainerKind];

impl Kind for ContainerKind {
    fn isolation(&self) -> Isolation {
        Isolation::Container
    }

    fn enter(&self, instances: &Instances, record: &InstanceRecord) -> Result<Box<dyn Ground>, BackendError> {
        Ok(Box::new(ContainerGround::enter(instances, record)?))
    }

    fn clean(&self, instances: &Instances, record: &InstanceRecord) -> Result<(), BackendError> {
        // Known by name even if the supervisor died before it was made.
        if let Some(path) = record.cgroup.as_deref().filter(|_| is_of_this_boot(record)) {
            let cgroup = Cgroup::at(path);
            cgroup.kill()?;
            cgroup.remove()?;
        }
        let runtime = match runtime::choose(&record.spec.runtime) {
            Ok(runtime) => runtime,
            // Its program was removed from the host: our own takes away what can be taken away without it.
            Err(_) => runtime::choose(&RuntimeChoice::Native)?,
        };
        runtime.delete(record, &instances.dir(&record.id))?;
        if kiln_net::needs_namespace(&record.spec.network.mode) && record.spec.network.mode != "none" {
            ContainerNetwork::new(instances.home()).teardown(&record.id)?;
        }
        Ok(())
    }

    fn planned_cgroup(&self, id: &InstanceId) -> Option<String> {
        cgroup::planned(id, host::is_host_root())
    }

    fn release_volumes(&self, instances: &Instances, volumes: &[String]) -> Result<(), BackendError> {
        Volumes::open(instances.home()).release(volumes)
    }
}

impl Hold for Cgroup {
    fn freeze(&self) -> Result<(), BackendError> {
        Ok(self.freeze()?)
    }

    fn thaw(&self) -> Result<(), BackendError> {
        Ok(self.thaw()?)
    }

    fn kill(&self) -> Result<(), BackendError> {
        Ok(self.kill()?)
    }

    fn out_of_memory(&self) -> bool {
        self.out_of_memory()
    }
}
