//! `kiln fs write`.

use std::io::{self, IsTerminal as _, Read, Seek as _};
use std::path::{Component, Path, PathBuf};

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::Platform;
use kiln_store::ImportLimits;
use oci_spec::image::{Arch, HistoryBuilder, ImageConfigurationBuilder, Os, RootFsBuilder};

use crate::commands::image::image_name;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Make an image of one file from standard input, and print its id
///
/// The same bytes at the same path give the same layer. `kiln fs read NAME` gives them back, and joined by `+` to other
/// images the file lies over them.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln fs write me/settings:1 etc/app.conf < app.conf\n  kiln fs run me/app+me/settings:1 -- /kiln/bin/app"
)]
pub(crate) struct Args {
    /// The image's name
    #[arg(value_name = "REF", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    /// The file's path in it
    #[arg(default_value = "blob")]
    path: PathBuf,
    /// Take this file instead of standard input
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// The permissions that it gets, octal
    #[arg(long, value_name = "MODE", default_value = "0644", value_parser = mode)]
    mode: u32,
}

fn mode(text: &str) -> std::result::Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| "a mode is an octal number up to 7777".to_owned())
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let name = image_name(&self.reference)?;
        let path = inside(&self.path)?;
        let mut spool =
            tempfile::tempfile().map_err(|error| CliError::file("cannot make a temporary file", error))?;
        let taken = match &self.file {
            Some(file) => std::fs::File::open(file)
                .and_then(|mut from| io::copy(&mut from, &mut spool))
                .map_err(|error| CliError::file(format!("cannot read {}", file.display()), error)),
            None if io::stdin().is_terminal() => {
                return Err(
                    CliError::usage("standard input is a terminal").with_hint("redirect it, or use --file")
                );
            }
            None => io::copy(&mut io::stdin().lock(), &mut spool)
                .map_err(|error| CliError::file("cannot read standard input", error)),
        };
        let length = taken?;
        spool.rewind().map_err(|error| CliError::file("cannot read a temporary file", error))?;
        let store = context.store()?;
        let archive = archive_of(&path, self.mode, length, spool).map_err(|error| {
            CliError::file(format!("cannot make a layer with `{}`", path.display()), error)
        })?;
        let layer = store.import_tar(archive, None, ImportLimits::default())?.layer;
        let image = store.make_image(&config()?, &[layer])?;
        store.tag(&name, &image.manifest_digest, "written")?;
        let mut out = Out::new();
        out.line(image.id.to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}

/// The path as it stands in an archive.
fn inside(path: &Path) -> Result<PathBuf> {
    let mut inside = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => inside.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(CliError::usage(format!("`{}` may lead out of the image", path.display()))
                    .with_hint("name the file from the image's root, without `..`"));
            }
        }
    }
    if inside.as_os_str().is_empty() {
        return Err(CliError::usage("the file has no name"));
    }
    Ok(inside)
}

/// A tar with the file and the directories that lead to it, always the same for the same bytes.
fn archive_of(path: &Path, mode: u32, length: u64, file: impl Read + Send) -> io::Result<impl Read + Send> {
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header
    };
    let mut archive = tar::Builder::new(Vec::new());
    let mut above: Vec<&Path> =
        path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
    above.reverse();
    for directory in above {
        archive.append_data(&mut header(tar::EntryType::Directory, 0o755, 0), directory, io::empty())?;
    }
    // The header of the file alone: what it announces comes after it.
    archive.append_data(&mut header(tar::EntryType::Regular, mode, length), path, io::empty())?;
    let before = archive.get_ref().clone();
    // To whole blocks, and the two empty ones that end an archive.
    let padding = length.next_multiple_of(512) - length + 1024;
    Ok(io::Cursor::new(before).chain(file.take(length)).chain(io::repeat(0).take(padding)))
}

fn config() -> Result<oci_spec::image::ImageConfiguration> {
    let platform = Platform::host();
    let incomplete =
        |error: oci_spec::OciSpecError| CliError::failed(format!("cannot make the image's config: {error}"));
    let now = jiff::Timestamp::now().to_string();
    let rootfs = RootFsBuilder::default().typ("layers").diff_ids(Vec::new()).build().map_err(incomplete)?;
    let step = HistoryBuilder::default()
        .created(now.clone())
        .created_by("kiln fs write")
        .build()
        .map_err(incomplete)?;
    ImageConfigurationBuilder::default()
        .created(now)
        .os(Os::from(platform.os.as_str()))
        .architecture(Arch::from(platform.architecture.as_str()))
        .rootfs(rootfs)
        .history(vec![step])
        .build()
        .map_err(incomplete)
}
