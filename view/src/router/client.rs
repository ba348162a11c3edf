//! Asks the service.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use kiln_contract::{BackendError, ErrorKind, Home};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::api::{
    MountRequest, RemountRequest, RouterClient, ShutdownRequest, StatusReply, StatusRequest, UnmountRequest,
    from_status, unmount_request,
};
use crate::sockets::ShortPath;
#[cfg(target_os = "linux")]
use crate::views::Alteration;

type Result<T> = std::result::Result<T, BackendError>;

/// The service answers from memory, or mounts; longer than this is not normal.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the service of a home. It blocks the thread that asks.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    api: RouterClient<Channel>,
}

impl Client {
    /// Connects to the service of a home. `None`: none runs.
    ///
    /// # Errors
    /// The socket is another user's, or does not answer.
    pub fn connect(home: &Home) -> Result<Option<Self>> {
        let directory = home.router();
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            BackendError::caused(format!("cannot ask the service of views in {}", directory.display()), error)
        };
        let socket = directory.join(super::SOCKET);
        let owner = match fs::symlink_metadata(&socket) {
            Ok(metadata) => metadata.uid(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error.into())),
        };
        if owner != rustix::process::geteuid().as_raw() {
            let what = format!("the service of views in {} is another user's", directory.display());
            return Err(BackendError::new(ErrorKind::State, what).hint("use a KILN_HOME of your own"));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| failed(error.into()))?;
        let short = ShortPath::of(&directory).map_err(|error| failed(error.into()))?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", short.join(super::SOCKET).display()))
            .map_err(|error| failed(error.into()))?
            .timeout(PATIENCE);
        let Ok(channel) = runtime.block_on(endpoint.connect()) else { return Ok(None) };
        Ok(Some(Self { runtime, api: RouterClient::new(channel) }))
    }

    /// Shows a recorded view to a process and to all that descend from it.
    ///
    /// # Errors
    /// There is no such view or process, it has one at this path already, or it cannot be mounted.
    pub fn mount(&mut self, view: &str, pid: u32) -> Result<()> {
        let request = MountRequest { view: view.to_owned(), pid };
        told(self.runtime.block_on(self.api.mount(request))).map(drop)
    }

    /// Shows the stack that the record of a view has now. Files that are open stay open.
    ///
    /// # Errors
    /// It is not shown, or its stack cannot be.
    pub fn remount(&mut self, view: &str) -> Result<()> {
        let request = RemountRequest { view: view.to_owned(), change: None };
        told(self.runtime.block_on(self.api.remount(request))).map(drop)
    }

    /// Changes a view that is shown, and its record. Files that are open stay open.
    ///
    /// # Errors
    /// It is not shown, or cannot be changed so: it is as it was then.
    #[cfg(target_os = "linux")]
    pub fn alter(&mut self, view: &str, alteration: &Alteration) -> Result<()> {
        let change = Some(super::api::to_change(alteration));
        let request = RemountRequest { view: view.to_owned(), change };
        told(self.runtime.block_on(self.api.remount(request))).map(drop)
    }

    /// Shows a view to nobody any more. Returns the names of those that are gone.
    ///
    /// # Errors
    /// It is shown to nobody.
    pub fn unmount_view(&mut self, view: &str) -> Result<Vec<String>> {
        self.unmount(unmount_request::What::View(view.to_owned()))
    }

    /// Takes from a process what was shown to itself. Returns the names of the views that nobody sees any more.
    ///
    /// # Errors
    /// Nothing was.
    pub fn unmount_process(&mut self, pid: u32) -> Result<Vec<String>> {
        self.unmount(unmount_request::What::Pid(pid))
    }

    fn unmount(&mut self, what: unmount_request::What) -> Result<Vec<String>> {
        let request = UnmountRequest { what: Some(what) };
        Ok(told(self.runtime.block_on(self.api.unmount(request)))?.views)
    }

    /// What is shown.
    ///
    /// # Errors
    /// The service does not answer.
    pub fn status(&mut self) -> Result<StatusReply> {
        told(self.runtime.block_on(self.api.status(StatusRequest {})))
    }

    /// Ends the service. Views stay recorded.
    ///
    /// # Errors
    /// The service does not answer.
    pub fn shutdown(&mut self) -> Result<()> {
        told(self.runtime.block_on(self.api.shutdown(ShutdownRequest {}))).map(drop)
    }
}

fn told<T>(answer: std::result::Result<Response<T>, Status>) -> Result<T> {
    answer.map(Response::into_inner).map_err(|status| from_status(&status))
}
