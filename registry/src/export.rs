//! Images into files that other tools read: OCI layouts and archives, `docker save` archives, root filesystems.
//!
//! Ids stay what they are: configs are written byte for byte. A manifest stays too if its layers come out with the same
//! digests, which is so for uncompressed ones and for those that Kiln itself packed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use kiln_contract::{Digest, Progress, Step};
use kiln_store::{Image, ImageName, Store};
use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use tar_core::{EntryType, HeaderBuilder};
use tempfile::NamedTempFile;

use crate::compression::{Compression, Compressor};
use crate::import::{IMAGE_NAME, REF_NAME, blob_path};
use crate::manifest::{self, MANIFEST_LIMIT, platform_of};
use crate::pack::{self, Packing, Spooled};
use crate::{Format, RegistryError, Result};

/// Writes images to `to` (`-` is standard output). A layout that is there already gets the images on top of those it has; an
/// archive is replaced in one step.
///
/// `compression` is for layers of OCI formats, and for the whole tar of a root filesystem; `docker save` archives have
/// layers uncompressed. A root filesystem is one image's: a tar of its layers merged ([`Store::export_rootfs`]).
///
/// # Errors
/// As [`RegistryError`] tells; an archive file is then as it was.
pub fn export(
    store: &Store,
    images: &[(Option<ImageName>, Image)],
    format: Format,
    to: &Path,
    compression: Compression,
    progress: &dyn Progress,
) -> Result<()> {
    let mut export = Export {
        store,
        to,
        compression,
        progress,
        sink: Sink::open(format, to)?,
        written: HashSet::new(),
        layers: HashMap::new(),
    };
    match format {
        Format::OciLayout | Format::OciArchive => export.layout(images)?,
        Format::DockerArchive => export.docker(images)?,
        Format::Rootfs => return export.rootfs(images),
    }
    export.sink.close(to)
}

/// Where the files of an export go.
enum Sink {
    Directory(PathBuf),
    /// Standard output, a pipe or a device.
    Output(BufWriter<Box<dyn Write>>),
    Tar(BufWriter<NamedTempFile>),
}

struct Export<'a> {
    store: &'a Store,
    to: &'a Path,
    compression: Compression,
    progress: &'a dyn Progress,
    sink: Sink,
    written: HashSet<String>,
    /// Layers that were packed, by their identity.
    layers: HashMap<Digest, Descriptor>,
}

impl Sink {
    fn open(format: Format, to: &Path) -> Result<Self> {
        let failed = |source| RegistryError::Io { doing: "write", path: to.to_owned(), source };
        if format == Format::OciLayout {
            if to == Path::new("-") {
                return Err(failed(io::Error::other(
                    "a layout is a directory; write an archive to standard output",
                )));
            }
            fs::create_dir_all(to.join("blobs/sha256")).map_err(failed)?;
            return Ok(Self::Directory(to.to_owned()));
        }
        if to == Path::new("-") {
            return Ok(Self::Output(BufWriter::with_capacity(256 << 10, Box::new(io::stdout()))));
        }
        // A new file takes an old one's place when it is complete; a device or a pipe is written to.
        match fs::metadata(to) {
            Ok(there) if !there.is_file() => {
                let opened = fs::OpenOptions::new().write(true).open(to).map_err(failed)?;
                return Ok(Self::Output(BufWriter::with_capacity(256 << 10, Box::new(opened))));
            }
            _ => {}
        }
        Ok(Self::Tar(BufWriter::with_capacity(256 << 10, NamedTempFile::new_in(parent(to)).map_err(failed)?)))
    }

    fn add(&mut self, name: &str, size: u64, content: &mut dyn Read) -> io::Result<()> {
        match self {
            Self::Directory(dir) => {
                let path = dir.join(name);
                let mut file = NamedTempFile::new_in(parent(&path))?;
                io::copy(content, &mut file)?;
                readable(file.as_file())?;
                file.persist(path)?;
                Ok(())
            }
            Self::Output(out) => add_to_tar(out, name, size, content),
            Self::Tar(out) => add_to_tar(out, name, size, content),
        }
    }

    fn close(self, to: &Path) -> Result<()> {
        let failed = |source| RegistryError::Io { doing: "write", path: to.to_owned(), source };
        match self {
            Self::Directory(_) => Ok(()),
            Self::Output(mut out) => out.write_all(&[0; 1024]).and_then(|()| out.flush()).map_err(failed),
            Self::Tar(mut out) => {
                out.write_all(&[0; 1024]).map_err(failed)?;
                let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
                readable(file.as_file()).map_err(failed)?;
                file.persist(to).map_err(|error| failed(error.error))?;
                Ok(())
            }
        }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Temporary files are for their owner alone; what is exported is not.
fn readable(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

/// One regular file; the same content always gives the same bytes.
fn add_to_tar(out: &mut impl Write, name: &str, size: u64, content: &mut dyn Read) -> io::Result<()> {
    let mut header = HeaderBuilder::new_gnu();
    let filled = header
        .path(name)
        .and_then(|header| header.mode(0o644))
        .and_then(|header| header.uid(0)?.gid(0)?.mtime(0)?.size(size))
        .map_err(|error| io::Error::other(error.to_string()))?;
    out.write_all(filled.entry_type(EntryType::Regular).finish().as_bytes())?;
    if io::copy(content, out)? != size {
        return Err(io::Error::other(format!("`{name}` changed while it was written")));
    }
    let padding = size.next_multiple_of(512) - size;
    out.write_all(&[0; 512][..padding as usize])
}

impl Export<'_> {
    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        if !self.written.insert(name.to_owned()) {
            return Ok(());
        }
        let failed = |source| RegistryError::Io { doing: "write", path: self.to.join(name), source };
        self.sink.add(name, bytes.len() as u64, &mut &bytes[..]).map_err(failed)
    }

    /// Writes a layer once; `path` makes its name from its digest. Its descriptor.
    fn layer(
        &mut self,
        diff_id: &Digest,
        compression: Compression,
        path: impl Fn(&Digest) -> String,
    ) -> Result<Descriptor> {
        if let Some(done) = self.layers.get(diff_id) {
            return Ok(done.clone());
        }
        let step = self.progress.begin(Step { name: diff_id.short(), verb: "export", total: None });
        let packing = Packing::Stream(compression);
        let Spooled { mut file, digest, length, .. } = pack::into_file(self.store, diff_id, packing)?;
        let name = path(&digest);
        if self.written.insert(name.clone()) {
            let failed = |source| RegistryError::Io { doing: "write", path: self.to.join(&name), source };
            self.sink.add(&name, length, &mut file).map_err(failed)?;
        }
        self.progress.advance(step, length as i64);
        self.progress.end(step, "done");
        let descriptor = manifest::descriptor(manifest::layer_media_type(compression), &digest, length);
        self.layers.insert(*diff_id, descriptor.clone());
        Ok(descriptor)
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        self.store.blob(digest)?.ok_or_else(|| RegistryError::Invalid {
            what: "image",
            name: digest.to_string(),
            reason: "the blob is not in the store".into(),
        })
    }

    fn layout(&mut self, images: &[(Option<ImageName>, Image)]) -> Result<()> {
        let mut entries = Vec::new();
        for (name, image) in images {
            let config = self.blob(&image.id)?;
            self.add(&blob_path(&image.id), &config)?;
            let mut layers = Vec::new();
            for diff_id in &image.diff_ids() {
                layers.push(self.layer(diff_id, self.compression, blob_path)?);
            }
            let (media_type, bytes) = manifest::with_layers(self.store, image, &layers, config.len() as u64)?;
            let digest = Digest::of(&bytes);
            self.add(&blob_path(&digest), &bytes)?;
            let mut descriptor =
                manifest::descriptor(MediaType::from(media_type.as_str()), &digest, bytes.len() as u64);
            descriptor.set_platform(Some(oci_platform(image)));
            if let Some(name) = name {
                // The tag alone is what `skopeo` and `umoci` select by; where it is not unique, the whole name must do.
                let tag = name.tag.clone().unwrap_or_else(|| "latest".into());
                let unique = images
                    .iter()
                    .filter(|(other, _)| other.as_ref().is_some_and(|other| other.tag == name.tag))
                    .count()
                    == 1;
                let full = format!("{}:{tag}", name.repository);
                descriptor.set_annotations(Some(HashMap::from([
                    (REF_NAME.to_owned(), if unique { tag } else { full.clone() }),
                    (IMAGE_NAME.to_owned(), full),
                ])));
            }
            entries.push(descriptor);
        }
        let index = self.index_with(entries)?;
        let bytes = serde_json::to_vec(&index).map_err(|error| RegistryError::Io {
            doing: "write",
            path: self.to.to_owned(),
            source: error.into(),
        })?;
        self.add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        self.add("index.json", &bytes)
    }

    /// The index of a layout that is there, with `entries` in the place of those that have their names.
    fn index_with(&self, entries: Vec<Descriptor>) -> Result<ImageIndex> {
        let mut index = ImageIndex::default();
        index.set_schema_version(2);
        index.set_media_type(Some(MediaType::ImageIndex));
        let mut all = Vec::new();
        if let Sink::Directory(dir) = &self.sink {
            let archive = crate::archive::Archive::Directory(dir.clone());
            if let Some(bytes) = archive.read("index.json", MANIFEST_LIMIT)? {
                index = serde_json::from_slice(&bytes).map_err(|error| RegistryError::Invalid {
                    what: "index.json",
                    name: dir.display().to_string(),
                    reason: error.to_string(),
                })?;
                let name =
                    |descriptor: &Descriptor| descriptor.annotations().as_ref()?.get(REF_NAME).cloned();
                all.extend(
                    index
                        .manifests()
                        .iter()
                        .filter(|old| {
                            !entries.iter().any(|new| {
                                old.digest() == new.digest()
                                    || (name(old).is_some() && name(old) == name(new))
                            })
                        })
                        .cloned(),
                );
            }
        }
        all.extend(entries);
        index.set_manifests(all);
        Ok(index)
    }

    fn docker(&mut self, images: &[(Option<ImageName>, Image)]) -> Result<()> {
        let mut saved: Vec<serde_json::Value> = Vec::new();
        let mut ids: Vec<Digest> = Vec::new();
        let mut tags: Vec<Vec<String>> = Vec::new();
        let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (name, image) in images {
            let name = name.as_ref().filter(|name| name.tag.is_some());
            if let Some(known) = ids.iter().position(|id| *id == image.id) {
                tags[known].extend(name.map(ImageName::familiar));
                continue;
            }
            let mut layers = Vec::new();
            let path = |digest: &Digest| format!("{}.tar", digest.hex());
            for diff_id in &image.diff_ids() {
                let descriptor = self.layer(diff_id, Compression::None, path)?;
                layers.push(path(&manifest::descriptor_digest(&descriptor, "")?));
            }
            let config = self.blob(&image.id)?;
            let config_path = format!("{}.json", image.id.hex());
            self.add(&config_path, &config)?;
            if let (Some(name), Some(top)) = (name, layers.last()) {
                let familiar = name.familiar();
                if let Some((repository, tag)) = familiar.rsplit_once(':') {
                    let top = top.trim_end_matches(".tar").to_owned();
                    repositories.entry(repository.into()).or_default().insert(tag.into(), top);
                }
            }
            ids.push(image.id);
            tags.push(name.map(ImageName::familiar).into_iter().collect());
            saved.push(serde_json::json!({"Config": config_path, "Layers": layers}));
        }
        for (entry, tags) in saved.iter_mut().zip(tags) {
            entry["RepoTags"] = tags.into();
        }
        let text = |value: serde_json::Result<Vec<u8>>| {
            value.map_err(|error| RegistryError::Io {
                doing: "write",
                path: self.to.to_owned(),
                source: error.into(),
            })
        };
        let (manifest, repositories) =
            (text(serde_json::to_vec(&saved))?, text(serde_json::to_vec(&repositories))?);
        self.add("manifest.json", &manifest)?;
        self.add("repositories", &repositories)
    }

    /// The tar of an image's files: its layers merged.
    fn rootfs(self, images: &[(Option<ImageName>, Image)]) -> Result<()> {
        let [(_, image)] = images else {
            return Err(RegistryError::Unsupported {
                name: format!("{} images", images.len()),
                reason: "one root filesystem is one image".into(),
            });
        };
        let failed = |source| RegistryError::Io { doing: "write", path: self.to.to_owned(), source };
        match self.sink {
            Sink::Output(out) => {
                let mut compressor = Compressor::new(self.compression, out).map_err(failed)?;
                self.store.export_rootfs(&image.layers, &mut compressor)?;
                compressor.finish().and_then(|mut out| out.flush()).map_err(failed)
            }
            Sink::Tar(out) => {
                let mut compressor = Compressor::new(self.compression, out).map_err(failed)?;
                self.store.export_rootfs(&image.layers, &mut compressor)?;
                let out = compressor.finish().map_err(failed)?;
                let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
                readable(file.as_file()).map_err(failed)?;
                file.persist(self.to).map_err(|error| failed(error.error))?;
                Ok(())
            }
            Sink::Directory(_) => Err(failed(io::Error::other("a root filesystem is written as a tar"))),
        }
    }
}

fn oci_platform(image: &Image) -> oci_spec::image::Platform {
    let is = platform_of(&image.config);
    let mut platform = oci_spec::image::Platform::default();
    platform.set_os(is.os.as_str().into());
    platform.set_architecture(is.architecture.as_str().into());
    platform.set_variant(is.variant);
    platform
}
