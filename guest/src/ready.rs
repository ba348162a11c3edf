//! What is done before the machine is anybody.
//!
//! A template is saved when this is done, and every machine that starts from it finds it done: whatever neither image, name nor
//! network change belongs here. Under software emulation code is translated anew in every process of the hypervisor, so what
//! is not executed after a restore is what makes a start fast.

use std::sync::{Mutex, PoisonError};

use kiln_usernet::guest::{Tun, TunConfig};

use crate::disks::{self, Disk};
use crate::failure::{Doing as _, Failure};
use crate::root::{Parts, System};
use crate::{network, root};

/// What a root and a network are made of.
#[derive(Debug)]
pub(crate) struct Ready {
    /// What the root is made of, until it is.
    root: Mutex<Option<Parts>>,
    /// The network's device, until somebody has it; dropped, it is gone.
    network: Mutex<Option<Tun>>,
}

impl Ready {
    /// Makes everything. The calling process must be in the workload's control group namespace.
    pub(crate) fn make() -> Result<Self, Failure> {
        network::bring_up_loopback()?;
        for directory in [root::IMAGE, root::DISK, root::MOUNT, crate::mounts::FILES] {
            std::fs::create_dir_all(directory).doing(format_args!("make {directory}"))?;
        }
        let mut parts = Parts {
            image: disks::find(disks::IMAGE)?,
            disk: Disk::find()?,
            is_new: false,
            system: System::make()?,
        };
        if parts.disk.has_filesystem()? {
            parts.disk.mount(root::DISK)?;
            parts.is_new = root::lay_out()?;
            parts.disk.settle()?;
        }
        let network = Tun::create(&TunConfig::default()).doing("make the network")?;
        Ok(Self { root: Mutex::new(Some(parts)), network: Mutex::new(Some(network)) })
    }

    /// The parts of the root, for once.
    pub(crate) fn take_root(&self) -> Option<Parts> {
        self.root.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The network's device, for once.
    pub(crate) fn take_network(&self) -> Option<Tun> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
