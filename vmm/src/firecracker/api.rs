//! Firecracker's API, as far as machines need it: `src/firecracker/swagger/firecracker.yaml` of Firecracker 1.14.
//!
//! JSON over HTTP on a Unix socket. A request that was done is answered with 204, or 200 and a body; one that was refused with
//! 400 and `{"fault_message": …}`. Unknown fields are refused. What describes the machine is put before it starts
//! (`InstanceStart`), or all of it comes with a snapshot, which is loaded only into a process that was told nothing yet; a
//! snapshot is made only of a machine that is paused.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::http::Connection;
use crate::VmmError;

/// How long most requests may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one may take that writes all memory to a disk.
const TO_WRITE_MEMORY: Duration = Duration::from_secs(600);

/// A request.
pub(super) trait Request: Serialize {
    /// `PUT /vsock`: the method and the path, and the name in errors.
    const NAME: &'static str;
    /// What the path goes on with.
    const ID: &'static str = "";
    /// How long it may take.
    const PATIENCE: Duration = PATIENCE;
    /// What is answered; `()` for nothing.
    type Answer: Answer;
}

/// What comes with the answer to a request.
pub(super) trait Answer: Sized {
    fn read(body: &[u8]) -> Result<Self, String>;
}

impl Answer for () {
    fn read(body: &[u8]) -> Result<Self, String> {
        if body.is_empty() { Ok(()) } else { Err(format!("{} bytes that nobody asked for", body.len())) }
    }
}

/// An answer in JSON.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> Answer for Json<T> {
    fn read(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map(Self).map_err(|error| error.to_string())
    }
}

/// The number of processors and the memory. Before the start.
#[derive(Debug, Serialize)]
pub(super) struct PutMachineConfig {
    pub(super) vcpu_count: u32,
    pub(super) mem_size_mib: u64,
}

impl Request for PutMachineConfig {
    const NAME: &'static str = "PUT /machine-config";
    type Answer = ();
}

/// What is booted. Before the start.
#[derive(Debug, Serialize)]
pub(super) struct PutBootSource<'a> {
    /// An ELF file on x86-64, an `Image` on aarch64; never compressed.
    pub(super) kernel_image_path: &'a str,
    pub(super) initrd_path: &'a str,
    pub(super) boot_args: String,
}

impl Request for PutBootSource<'_> {
    const NAME: &'static str = "PUT /boot-source";
    type Answer = ();
}

/// How a disk's flushes are taken.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum CacheType {
    /// They are ignored.
    Unsafe,
    /// They reach the file.
    Writeback,
}

/// A disk. Before the start; the order of the requests is that of the devices.
#[derive(Debug, Serialize)]
pub(super) struct PutDrive<'a> {
    pub(super) drive_id: &'static str,
    pub(super) path_on_host: &'a str,
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
    pub(super) cache_type: CacheType,
}

/// The read-only image disk.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct PutImage<'a>(pub(super) PutDrive<'a>);

impl Request for PutImage<'_> {
    const NAME: &'static str = "PUT /drives";
    const ID: &'static str = IMAGE;
    type Answer = ();
}

/// The writable disk.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct PutDisk<'a>(pub(super) PutDrive<'a>);

impl Request for PutDisk<'_> {
    const NAME: &'static str = "PUT /drives";
    const ID: &'static str = DISK;
    type Answer = ();
}

/// The image disk's name here.
pub(super) const IMAGE: &str = "image";
/// The writable disk's name here.
pub(super) const DISK: &str = "disk";

/// The file behind the writable disk is looked at again: the guest is told its size. After the start.
#[derive(Debug, Serialize)]
pub(super) struct PatchDisk<'a> {
    pub(super) drive_id: &'static str,
    pub(super) path_on_host: &'a str,
}

impl Request for PatchDisk<'_> {
    const NAME: &'static str = "PATCH /drives";
    const ID: &'static str = DISK;
    type Answer = ();
}

/// Sockets between host and guest. Before the start.
#[derive(Debug, Serialize)]
pub(super) struct PutVsock<'a> {
    pub(super) guest_cid: u32,
    pub(super) uds_path: &'a str,
}

impl Request for PutVsock<'_> {
    const NAME: &'static str = "PUT /vsock";
    type Answer = ();
}

/// A source of randomness. Before the start.
#[derive(Debug, Serialize)]
pub(super) struct PutEntropy {}

impl Request for PutEntropy {
    const NAME: &'static str = "PUT /entropy";
    type Answer = ();
}

/// A balloon. Before the start.
#[derive(Debug, Serialize)]
pub(super) struct PutBalloon {
    pub(super) amount_mib: u64,
    pub(super) deflate_on_oom: bool,
    /// What the guest frees goes back to the host (since 1.14).
    pub(super) free_page_reporting: bool,
}

impl Request for PutBalloon {
    const NAME: &'static str = "PUT /balloon";
    type Answer = ();
}

/// The size of the balloon. After the start.
#[derive(Debug, Serialize)]
pub(super) struct PatchBalloon {
    pub(super) amount_mib: u64,
}

impl Request for PatchBalloon {
    const NAME: &'static str = "PATCH /balloon";
    type Answer = ();
}

/// Something that a machine does.
#[derive(Debug, Serialize)]
#[serde(tag = "action_type")]
pub(super) enum PutAction {
    /// Begins to execute. Once.
    InstanceStart,
}

impl Request for PutAction {
    const NAME: &'static str = "PUT /actions";
    type Answer = ();
}

/// Stops to execute, or goes on. After the start.
#[derive(Debug, Serialize)]
#[serde(tag = "state")]
pub(super) enum PatchVm {
    Paused,
    Resumed,
}

impl Request for PatchVm {
    const NAME: &'static str = "PATCH /vm";
    type Answer = ();
}

/// How much a snapshot holds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum SnapshotType {
    /// All memory.
    Full,
}

/// Writes the state of a paused machine to two files.
#[derive(Debug, Serialize)]
pub(super) struct CreateSnapshot<'a> {
    pub(super) snapshot_type: SnapshotType,
    pub(super) snapshot_path: &'a str,
    pub(super) mem_file_path: &'a str,
}

impl Request for CreateSnapshot<'_> {
    const NAME: &'static str = "PUT /snapshot/create";
    const PATIENCE: Duration = TO_WRITE_MEMORY;
    type Answer = ();
}

/// Where memory comes from.
#[derive(Debug, Serialize)]
pub(super) struct MemoryBackend<'a> {
    pub(super) backend_type: BackendType,
    pub(super) backend_path: &'a str,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum BackendType {
    /// A file, which is mapped privately.
    File,
}

/// Becomes a machine that was saved. Nothing else may have been said before.
#[derive(Debug, Serialize)]
pub(super) struct LoadSnapshot<'a> {
    pub(super) snapshot_path: &'a str,
    pub(super) mem_backend: MemoryBackend<'a>,
    pub(super) resume_vm: bool,
}

impl Request for LoadSnapshot<'_> {
    const NAME: &'static str = "PUT /snapshot/load";
    type Answer = ();
}

/// What the machine is doing.
#[derive(Debug, Serialize)]
pub(super) struct GetInfo;

/// The answer to [`GetInfo`].
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    pub(super) state: String,
}

impl Request for GetInfo {
    const NAME: &'static str = "GET /";
    type Answer = Json<Info>;
}

/// An answer to what was refused.
#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// A connection to a Firecracker.
#[derive(Debug)]
pub(super) struct Api(Connection);

impl Api {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self(Connection::new(socket))
    }

    /// Has a request done.
    pub(super) fn ask<R: Request>(&mut self, request: &R) -> Result<R::Answer, VmmError> {
        let nonsense = |words: String| VmmError::Nonsense { command: R::NAME, words };
        let (method, path) = R::NAME.split_once(' ').unwrap_or((R::NAME, "/"));
        let path = if R::ID.is_empty() { path.to_owned() } else { format!("{path}/{}", R::ID) };
        let body = match method {
            // Refused with a body.
            "GET" => None,
            _ => Some(serde_json::to_vec(request).map_err(|error| nonsense(error.to_string()))?),
        };
        let response = self.0.exchange(R::NAME, method, &path, body.as_deref(), R::PATIENCE)?;
        match response.status {
            200 | 204 => R::Answer::read(&response.body).map_err(nonsense),
            status => {
                let fault = serde_json::from_slice::<Fault>(&response.body);
                let words = fault.map_or_else(
                    |_| format!("status {status}: {}", String::from_utf8_lossy(&response.body)),
                    |fault| fault.fault_message,
                );
                Err(VmmError::Refused { command: R::NAME, words })
            }
        }
    }
}
