//! `kiln fs render`.

use std::fs;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::thread;

use clap_complete::engine::ArgValueCompleter;
use kiln_instance::archive::{Archive, Base, Confine, Devices, Top, Unpack};

use super::whole_stack;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{self, Exit};
use crate::output::Out;

/// As much goes through the pipe at once.
const PIECE: usize = 128 << 10;

/// Write all files of an image, or of several as one, to a directory, and print its path
///
/// Root keeps their owners and makes devices; for others all files are theirs, and devices are left out.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name; several may be joined by `+`
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    /// The directory, which is made, or is empty
    #[arg(value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    /// The directory may have files in it: those of the image replace them
    #[arg(long)]
    allow_existing: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let stack = whole_stack(context, &store, &self.reference)?;
        let directory = &self.directory;
        let cannot = |error| CliError::file(format!("cannot write to {}", directory.display()), error);
        fs::create_dir_all(directory).map_err(cannot)?;
        if !self.allow_existing && fs::read_dir(directory).map_err(cannot)?.next().is_some() {
            return Err(CliError::failed(format!("{} is not empty", directory.display()))
                .with_hint("name another directory, or replace what is there with --allow-existing"));
        }
        let base = Base::open(directory, Confine::Beneath).map_err(cannot)?;
        let (mut reader, writer) = io::pipe().map_err(|error| CliError::file("cannot make a pipe", error))?;
        let (written, unpacked) = thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut writer = BufWriter::with_capacity(PIECE, writer);
                store.export_rootfs(&stack.layers, &mut writer).map(|()| writer.flush())
            });
            let unpacked = self.unpack(&mut reader, &base);
            // Who stops reading ends the writer too.
            drop(reader);
            (writing.join(), unpacked)
        });
        unpacked?;
        match written {
            Ok(written) => written?.map_err(|error| CliError::file("cannot write to a pipe", error))?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let mut out = Out::new();
        out.line(fs::canonicalize(directory).map_err(cannot)?.display().to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }

    fn unpack(&self, reader: &mut io::PipeReader, base: &Base) -> Result<()> {
        let archive = Archive::open(reader).map_err(CliError::archive("cannot read the image's files"))?;
        let root = rustix::process::geteuid().is_root();
        let left_out = |path: &Path| {
            exit::print_line("warning", &format!("{} is left out: it is a device node", path.display()));
        };
        let devices = if root { Devices::Made } else { Devices::LeftOut(&left_out) };
        let options = Unpack { owners: root, devices, top: None::<Top<'_>> };
        archive
            .unpack(base, Path::new(""), &options)
            .map_err(CliError::archive(format!("cannot write to {}", self.directory.display())))
    }
}
