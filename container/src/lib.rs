//! Linux containers: the native [`RuntimeBackend`](kiln_contract::RuntimeBackend), and their roots.
//!
//! ```no_run
//! use kiln_contract::{BackendError, Home, InstanceSpec, RuntimeBackend, StartMode};
//! use kiln_container::Containers;
//!
//! fn serve(spec: &InstanceSpec) -> Result<(), BackendError> {
//!     kiln_container::prepare()?;
//!     let containers = Containers::open(&Home::at("/var/lib/kiln"))?;
//!     let web = containers.create(spec)?;
//!     containers.start(&web.id, StartMode::Detached)?;
//!     assert_eq!(containers.wait(&web.id)?.code, 0);
//!     Ok(())
//! }
//! ```
//!
//! What is where: the verbs in `backend`, what a supervisor (of [`kiln_instance`]) does for a container in `kind` and
//! `ground`, how a container's process is made in `runtime`, `spec`, `seccomp` and `cgroup`.

#[cfg(target_os = "linux")]
mod backend;
#[cfg(target_os = "linux")]
mod capabilities;
#[cfg(target_os = "linux")]
mod cgroup;
#[cfg(target_os = "linux")]
mod commit;
#[cfg(target_os = "linux")]
mod copy;
#[cfg(target_os = "linux")]
mod devices;
#[cfg(target_os = "linux")]
mod exec;
#[cfg(target_os = "linux")]
mod ground;
#[cfg(target_os = "linux")]
mod host;
#[cfg(target_os = "linux")]
mod host_files;
#[cfg(target_os = "linux")]
mod kind;
#[cfg(target_os = "linux")]
mod mounts;
#[cfg(target_os = "linux")]
mod root;
#[cfg(target_os = "linux")]
mod runtime;
#[cfg(target_os = "linux")]
mod seccomp;
#[cfg(target_os = "linux")]
mod spec;
#[cfg(target_os = "linux")]
mod user_namespace;

#[cfg(target_os = "linux")]
pub use backend::Containers;
#[cfg(target_os = "linux")]
pub use kind::{ContainerKind, KINDS};

/// Moves this process to where containers can be made: nothing for root, for others the user namespace of their home
/// ([`Home::from_env`](kiln_contract::Home::from_env)) and a mount namespace. To be called first of all in `main`, while
/// the process has one thread.
///
/// # Errors
/// If this host gives its users no user namespaces.
#[cfg(target_os = "linux")]
pub fn prepare() -> Result<(), kiln_contract::BackendError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    match kiln_contract::Home::from_env(false) {
        Some(home) => user_namespace::enter(&home),
        None => kiln_view::userns::enter(),
    }
}
