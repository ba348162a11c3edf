//! `kiln init`.

use kiln_contract::{BackendError, ByteSize, RuntimeBackend as _};
use kiln_disk::Choice;

use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Choose where the writable disks of machines are kept
///
/// Without being told, Kiln shares blocks between disks where the file system of its home can do that, and copies where it
/// cannot. A btrfs pool is a file in the home in which disks share blocks on any file system.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln init\n  kiln init --disks btrfs --size 100G\n  kiln init --disks zfs:tank/kiln"
)]
pub(crate) struct Args {
    /// auto, reflink, btrfs, zfs:DATASET or sparse
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    disks: Choice,
    /// The size that a new btrfs pool may grow to
    #[arg(long, value_name = "SIZE", default_value = "50G")]
    size: ByteSize,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let home = context.home();
        std::fs::create_dir_all(home.path())
            .map_err(|error| CliError::file(format!("cannot make {}", home.path().display()), error))?;
        self.refuse_to_leave_disks(context)?;
        kiln_disk::prepare(home, &self.disks, self.size.bytes()).map_err(BackendError::from)?;
        // Tried before it is kept: what does not work here is never chosen.
        let opened = match self.disks {
            Choice::Auto => {
                Choice::Auto.save(home).map_err(BackendError::from)?;
                kiln_disk::open(home, &Choice::Auto)
            }
            ref chosen => kiln_disk::open(home, chosen),
        };
        let opened = opened.map_err(BackendError::from)?;
        self.disks.save(home).map_err(BackendError::from)?;
        let mut out = Out::new();
        out.line(format!("disks: {}: {}", opened.backend.name(), opened.reason))?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }

    /// Disks stay where they were made, so there must be none of machines when another place is chosen.
    fn refuse_to_leave_disks(&self, context: &Context) -> Result<()> {
        let home = context.home();
        if !home.disks().exists() || Choice::load(home).is_ok_and(|chosen| chosen == self.disks) {
            return Ok(());
        }
        let machines: Vec<_> = context
            .instances()?
            .list()?
            .into_iter()
            .filter(|record| record.spec.isolation == kiln_contract::Isolation::Machine)
            .map(|record| record.spec.name)
            .collect();
        if machines.is_empty() {
            return Ok(());
        }
        Err(CliError::failed(format!("cannot choose other disks: {} would lose theirs", machines.join(", ")))
            .with_hint("remove these machines first, or commit them to images"))
    }
}
