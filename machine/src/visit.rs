//! A look into a machine that does not run.
//!
//! Its disk is a filesystem of its guest's, which only a guest opens. So it is started for the length of one request, with
//! nothing of its workload: without its command, its network and what is shared with it.

use kiln_contract::{BackendError, ErrorKind, InstanceId};
use kiln_link::message::Configure;
use kiln_link::{Stream, service};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::backend::Machines;
use crate::beginning::find;
use crate::door;
use crate::life::lost;
use crate::monitor::power_off;
use crate::saved::Saved;
use crate::{plan, stream};

/// A stream to the guest's control service, through a door or of a visit.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl Duplex for Stream {}
impl Duplex for tokio::net::UnixStream {}
impl<D: Duplex + ?Sized> Duplex for &mut D {}

impl Machines {
    /// Speaks to the control service of a machine's guest, whether the machine runs or not.
    pub(crate) fn speak<T>(
        &self,
        id: &InstanceId,
        work: impl AsyncFnOnce(&mut dyn Duplex) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        if kiln_instance::is_supervised(&self.verbs().truth(id)?) {
            self.verbs().ready_for_exec(id)?;
            let dir = self.instances().dir(id);
            return stream::runtime()?.block_on(async {
                let mut stream = door::dial(&dir, service::CONTROL).await?;
                work(&mut stream).await
            });
        }
        // It stays locked, so that nobody starts it meanwhile.
        let still = self.still(id, "look into")?;
        let dir = self.instances().dir(id);
        if Saved::load(&plan::saved(&dir)).is_some() {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot look into machine {}: its memory is saved", still.record.spec.name),
            )
            .hint(format!("start it: `kiln start {}`", still.record.spec.name)));
        }
        self.prepare(&still.record)?;
        let mut found = find(self.home(), id)?;
        found.paths.network = plan::shape(&still.record.spec)?.unconnected()?;
        let outcome = stream::runtime()?.block_on(async {
            let configure = plan::configure(&still.record, Some(found.paths.disk_size), None)?;
            let configure = Configure { mounts: Vec::new(), network: false, ..configure };
            let life = found.begin().await?;
            life.configure(configure).await?;
            let opener = life.opener();
            let mut stream = opener.open(service::CONTROL).await.map_err(lost)?;
            let outcome = work(&mut stream).await;
            power_off(&opener).await;
            outcome
        });
        crate::saved::remove(&plan::base(&dir))?;
        outcome
    }
}
