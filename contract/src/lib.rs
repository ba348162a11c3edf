//! The traits and neutral types that every room of Kiln shares.
//!
//! This room does nothing by itself: it fixes the words. What a workload is made from
//! ([`InstanceSpec`]), what is known of it ([`InstanceRecord`]), and what anything that runs it must be
//! able to do ([`RuntimeBackend`], [`Hypervisor`], [`DiskBackend`], [`NetworkBackend`], [`ViewBackend`]).
//! It also holds the few values that all rooms must write the same way: digests, sizes, durations, and
//! the paths below `KILN_HOME`.
//!
//! ```
//! use kiln_contract::{ByteSize, Digest};
//!
//! let empty = Digest::of(b"");
//! assert_eq!(empty.to_string().len(), "sha256:".len() + 64);
//! assert_eq!("64m".parse::<ByteSize>().unwrap().bytes(), 64 << 20);
//! ```

mod backend;
mod digest;
mod disk;
mod home;
mod hypervisor;
mod instance;
mod linux_capability;
mod network;
mod platform;
mod progress;
mod quantity;
mod runtime;
mod spec;
mod view;

pub use backend::{BackendError, Capabilities, Capability, ErrorKind};
pub use digest::{Digest, DigestError, Hasher};
pub use disk::{
    DiskBackend, DiskId, DiskNameError, DiskSnapshot, DiskUsage, DisksUsage, PendingDisk, SnapshotName,
};
pub use home::{Home, InstanceDir};
pub use hypervisor::{BootConfig, Driver, Hypervisor, MemoryKind, Vm, VmConfig, VmHandle, VmState};
pub use instance::{
    ExitStatus, HealthState, HealthStatus, InstanceId, InstanceRecord, InstanceStatus, ProcessId,
};
pub use linux_capability::{UnknownCapability, linux_capability};
pub use network::{Attachment, NetworkBackend, NetworkRequest};
pub use platform::Platform;
pub use progress::{Progress, Silent, Step, StepId};
pub use quantity::{ByteSize, HumanDuration, QuantityError};
pub use runtime::{
    AttachEnd, AttachOptions, Change, ChangeKind, CommitOptions, ExecSpec, LogLine, LogQuery, LogStream,
    ProcessTable, RemoveOptions, RuntimeBackend, Snapshot, SnapshotOptions, StartMode, Stats, Stdio, Update,
};
pub use spec::{
    CpuLimit, HealthCheck, InstanceSpec, Isolation, MachineSpec, MountKind, MountSpec, NetworkSpec,
    ProcessSpec, Protocol, PublishSpec, Resources, RestartPolicy, RuntimeChoice, SecuritySpec, StopSpec,
    TmpfsOptions, Ulimit,
};
pub use view::{Scratch, ViewBackend, ViewRequest};
