//! `kiln system info`.

use kiln_contract::{InstanceStatus, Platform, RuntimeBackend};
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, Table, print_json};

/// Show where things are kept and what there is
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    format: FormatArgs,
}

/// Where things are kept and what there is, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Info {
    /// The version of this program.
    version: &'static str,
    /// The directory below which everything is kept.
    home: String,
    /// The directory of the store.
    store: String,
    /// Of workloads here: `linux/amd64`.
    platform: String,
    /// Of the host.
    kernel: String,
    /// Whether an ordinary user runs it.
    rootless: bool,
    /// How many instances there are.
    instances: usize,
    /// How many of them run.
    running: usize,
    /// How many images there are.
    images: usize,
    /// What does not work here, and why.
    missing: Vec<Missing>,
}

/// Something that does not work here.
#[derive(Debug, Serialize)]
struct Missing {
    /// What: `Pause`, `MemoryLimit`, …
    capability: String,
    /// Why.
    reason: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        // Before the user namespace is entered, in which everybody is root.
        let rootless = !rustix::process::geteuid().is_root();
        let instances = context.instances()?;
        let store = context.store()?;
        let records = instances.list()?;
        let missing = instances.capabilities();
        let missing = missing.missing().iter().map(|(capability, reason)| Missing {
            capability: format!("{capability:?}"),
            reason: reason.clone(),
        });
        let info = Info {
            version: env!("CARGO_PKG_VERSION"),
            home: context.home().path().display().to_string(),
            store: context.home().store().display().to_string(),
            platform: Platform::host().to_string(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            rootless,
            instances: records.len(),
            running: records.iter().filter(|record| record.status == InstanceStatus::Running).count(),
            images: store.images()?.len(),
            missing: missing.collect(),
        };
        if self.format.format == Format::Table {
            info.print()?;
        } else {
            print_json(self.format.format, &info)?;
        }
        Ok(Exit::SUCCESS)
    }
}

impl Info {
    fn print(&self) -> Result<()> {
        let mut table = Table::new(["WHAT", ""]);
        let user = if self.rootless { "ordinary user" } else { "root" };
        for (what, value) in [
            ("Version", self.version.to_owned()),
            ("Home", self.home.clone()),
            ("Store", self.store.clone()),
            ("Platform", self.platform.clone()),
            ("Kernel", self.kernel.clone()),
            ("User", user.to_owned()),
            ("Instances", format!("{}, {} running", self.instances, self.running)),
            ("Images", self.images.to_string()),
        ] {
            table.row([what.to_owned(), value]);
        }
        for missing in &self.missing {
            table.row([format!("Not here: {}", missing.capability), missing.reason.clone()]);
        }
        let mut out = Out::new();
        out.table(&table)?;
        out.flush()
    }
}
