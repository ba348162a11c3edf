//! An image and changes become an image with one layer more: what `commit` does, wherever the changes are.

use std::borrow::Cow;
use std::io::Read;
use std::path::Path;

use kiln_contract::{BackendError, CommitOptions, Digest, ErrorKind, Platform};
use oci_spec::image::{
    Arch, History, HistoryBuilder, ImageConfiguration, ImageConfigurationBuilder, Os, RootFs, RootFsBuilder,
};

use crate::directory::HostOptions;
use crate::source_date::SourceDate;
use crate::upper::{Lower, Upper};
use crate::{
    IdKind, Image, ImageName, ImportLimits, ImportedLayer, Selection, SelectionError, Store, StoreError,
};

type Result<T> = std::result::Result<T, CommitError>;

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The image below is not here.
    #[error("the image {0} is not in the store")]
    NoImage(Digest),
    /// An instruction makes no sense.
    #[error("cannot apply `{change}`: {why}")]
    Instruction {
        /// As it was given.
        change: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A name is none.
    #[error(transparent)]
    Name(StoreError),
    /// A pattern or a path to hide is none.
    #[error(transparent)]
    Selection(#[from] SelectionError),
    /// Only the layer was wanted, and there is none.
    #[error("nothing was changed: there is no layer to be kept")]
    Unchanged,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What was said of the image cannot be part of its config.
    #[error("cannot make the image's config: {0}")]
    Config(#[from] oci_spec::OciSpecError),
}

impl From<CommitError> for BackendError {
    fn from(error: CommitError) -> Self {
        let kind = match &error {
            CommitError::NoImage(_) => ErrorKind::NotFound,
            CommitError::Instruction { .. } | CommitError::Name(_) | CommitError::Selection(_) => {
                ErrorKind::Invalid
            }
            CommitError::Unchanged => ErrorKind::State,
            CommitError::Store(_) | CommitError::Config(_) => ErrorKind::Failed,
        };
        let hint = match &error {
            CommitError::Instruction { .. } => Some(
                "CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR are known"
                    .to_owned(),
            ),
            CommitError::Store(error) => error.hint(),
            _ => None,
        };
        let error = Self::caused("cannot commit", error).of_kind(kind);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// Where changes are.
pub enum Changes<'a> {
    /// There are none: only the config becomes another.
    None,
    /// In an overlay's upper directory, or a scratch, which has the same form ([`Store::import_upper`]).
    Upper {
        /// The directory.
        directory: &'a Path,
        /// The layers below, bottom first.
        lower: &'a [Digest],
        /// From ids on the disk to those in the image.
        map: &'a dyn Fn(u32, IdKind) -> u32,
    },
    /// All that is in a directory.
    Directory(&'a Path),
    /// In an OCI layer's tar, uncompressed.
    Tar(&'a mut (dyn Read + Send)),
}

impl std::fmt::Debug for Changes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Upper { directory, .. } => f.debug_tuple("Upper").field(directory).finish(),
            Self::Directory(directory) => f.debug_tuple("Directory").field(directory).finish(),
            Self::Tar(_) => f.write_str("Tar"),
        }
    }
}

/// What an image is made of.
#[derive(Debug)]
pub struct CommitRequest<'a> {
    /// What the changes were made in, or where they come from: for the history of the tags.
    pub name: &'a str,
    /// The image that it began as; `None` for one that begins with the changes.
    pub image: Option<Digest>,
    /// The stack of that, bottom first, without mount points.
    pub layers: &'a [Digest],
    /// What ran: for the image's history.
    pub command: &'a [String],
    /// Names, message, author, instructions, and what of the changes is wanted.
    pub options: &'a CommitOptions,
}

impl CommitRequest<'_> {
    /// Looks at everything that can be wrong before a layer is made: a wrong name must cost nothing.
    ///
    /// # Errors
    /// A name, a pattern or an instruction that is none; an image that is not here.
    pub fn check(&self, store: &Store) -> Result<()> {
        self.tags()?;
        self.selection()?;
        self.config(store).map(drop)
    }

    fn tags(&self) -> Result<Vec<ImageName>> {
        self.options.tags.iter().map(|tag| ImageName::parse(tag).map_err(CommitError::Name)).collect()
    }

    fn selection(&self) -> Result<Selection> {
        let options = self.options;
        Ok(Selection::new(&options.include, &options.exclude, &options.masks)?)
    }

    fn config(&self, store: &Store) -> Result<ImageConfiguration> {
        let mut config = match &self.image {
            Some(image) => store.image(image)?.ok_or(CommitError::NoImage(*image))?.config,
            None => empty_config()?,
        };
        if self.options.layer_only {
            // What is said of the layers below is not true of it.
            config.set_rootfs(no_layers()?);
            config.set_history(None);
        }
        apply(&mut config, &self.options.changes)?;
        Ok(config)
    }
}

/// The config of an image for this host that says nothing else.
fn empty_config() -> Result<ImageConfiguration> {
    let platform = Platform::host();
    let config = ImageConfigurationBuilder::default()
        .os(Os::from(platform.os.as_str()))
        .architecture(Arch::from(platform.architecture.as_str()))
        .rootfs(no_layers()?)
        .build()?;
    Ok(config)
}

fn no_layers() -> Result<RootFs> {
    Ok(RootFsBuilder::default().typ("layers").diff_ids(Vec::new()).build()?)
}

impl Store {
    /// Makes a layer of changes, an image of that and another one, and gives it its names.
    ///
    /// If `SOURCE_DATE_EPOCH` is set, no time in the layer or in the image is later: equal content has equal digests then,
    /// whenever it is committed.
    ///
    /// # Errors
    /// As [`CommitRequest::check`]; [`CommitError::Unchanged`]; and those of the store: [`StoreError::Changing`] for files
    /// that never stay as they are.
    pub fn commit(&self, request: &CommitRequest<'_>, changes: Changes<'_>) -> Result<Image> {
        let (tags, selection, mut config) = (request.tags()?, request.selection()?, request.config(self)?);
        let layer = self.layer_of(changes, &selection)?.map(|imported| imported.layer);
        let options = request.options;
        if options.layer_only && layer.is_none() {
            return Err(CommitError::Unchanged);
        }
        let below = if options.layer_only { &[] } else { request.layers };
        let layers: Vec<Digest> = below.iter().copied().chain(layer).collect();
        add_step(&mut config, request, layer.is_none())?;
        let image = self.make_image(&config, &layers)?;
        for tag in &tags {
            self.tag(tag, &image.manifest_digest, &format!("commit of {}", request.name))?;
        }
        Ok(image)
    }

    fn layer_of(&self, changes: Changes<'_>, selection: &Selection) -> Result<Option<ImportedLayer>> {
        let options = HostOptions { selection: Cow::Borrowed(selection), ..HostOptions::new()? };
        let layer = match changes {
            Changes::None => return Ok(None),
            Changes::Upper { directory, lower, map } => {
                let upper = Upper::new(Lower::new(self, lower), map);
                self.import_host(directory, Some(&upper), &options)?
            }
            Changes::Directory(directory) => self.import_host(directory, None, &options)?,
            Changes::Tar(tar) => {
                let layer = self.import_tar(tar, None, ImportLimits::default())?;
                self.reshape(layer, selection, options.date)?
            }
        };
        Ok(Some(layer))
    }
}

/// Says in an image's history what was done.
fn add_step(config: &mut ImageConfiguration, request: &CommitRequest<'_>, empty_layer: bool) -> Result<()> {
    let options = request.options;
    let now = SourceDate::from_environment()?.now().to_string();
    let mut step = HistoryBuilder::default()
        .created(now.clone())
        .created_by(request.command.join(" "))
        .empty_layer(empty_layer);
    if !options.message.is_empty() {
        step = step.comment(options.message.clone());
    }
    if !options.author.is_empty() {
        step = step.author(options.author.clone());
        config.set_author(Some(options.author.clone()));
    }
    let mut history: Vec<History> = config.history().clone().unwrap_or_default();
    history.push(step.build()?);
    config.set_history(Some(history));
    config.set_created(Some(now));
    Ok(())
}

/// Applies Dockerfile instructions to an image's config, as `docker commit --change` does.
fn apply(image: &mut ImageConfiguration, changes: &[String]) -> Result<()> {
    let mut config = image.config().clone().unwrap_or_default();
    for change in changes {
        let (instruction, value) =
            change.trim().split_once(char::is_whitespace).unwrap_or((change.trim(), ""));
        let value = value.trim();
        let wrong = |why| CommitError::Instruction { change: change.clone(), why };
        if value.is_empty() {
            return Err(wrong("it has no value"));
        }
        match instruction.to_ascii_uppercase().as_str() {
            "CMD" => {
                config.set_cmd(Some(command(value)));
            }
            "ENTRYPOINT" => {
                config.set_entrypoint(Some(command(value)));
            }
            "ENV" => {
                let mut env = config.env().clone().unwrap_or_default();
                for (key, value) in pairs(value).ok_or_else(|| wrong("it is not NAME=value"))? {
                    env.retain(|line| line.split('=').next() != Some(&key));
                    env.push(format!("{key}={value}"));
                }
                config.set_env(Some(env));
            }
            "LABEL" => {
                let mut labels = config.labels().clone().unwrap_or_default();
                labels.extend(pairs(value).ok_or_else(|| wrong("it is not NAME=value"))?);
                config.set_labels(Some(labels));
            }
            "EXPOSE" => {
                let mut ports = config.exposed_ports().clone().unwrap_or_default();
                for port in value.split_whitespace() {
                    let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
                    let valid =
                        number.parse::<u16>().is_ok_and(|n| n > 0) && ["tcp", "udp"].contains(&protocol);
                    if !valid {
                        return Err(wrong("a port is a number from 1 to 65535 with /tcp or /udp"));
                    }
                    ports.push(format!("{number}/{protocol}"));
                }
                ports.sort();
                ports.dedup();
                config.set_exposed_ports(Some(ports));
            }
            "VOLUME" => {
                let mut volumes = config.volumes().clone().unwrap_or_default();
                volumes.extend(command_list(value).unwrap_or_else(|| words(value)));
                volumes.sort();
                volumes.dedup();
                config.set_volumes(Some(volumes));
            }
            "USER" => {
                config.set_user(Some(value.to_owned()));
            }
            "WORKDIR" => {
                config.set_working_dir(Some(value.to_owned()));
            }
            "STOPSIGNAL" => {
                config.set_stop_signal(Some(value.to_owned()));
            }
            _ => return Err(wrong("the instruction is not known")),
        }
    }
    image.set_config(Some(config));
    Ok(())
}

/// A command in JSON form, or a line for the shell.
fn command(value: &str) -> Vec<String> {
    command_list(value).unwrap_or_else(|| vec!["/bin/sh".into(), "-c".into(), value.into()])
}

fn command_list(value: &str) -> Option<Vec<String>> {
    serde_json::from_str(value).ok()
}

fn words(value: &str) -> Vec<String> {
    value.split_whitespace().map(str::to_owned).collect()
}

/// `A=b C="d e"`, or the old form `A b c`.
fn pairs(value: &str) -> Option<Vec<(String, String)>> {
    if !value.split_whitespace().next()?.contains('=') {
        let (key, value) = value.split_once(char::is_whitespace)?;
        return Some(vec![(key.to_owned(), value.trim().to_owned())]);
    }
    let mut pairs = Vec::new();
    let mut rest = value.chars().peekable();
    while rest.peek().is_some() {
        let mut word = String::new();
        let mut quote = None;
        while let Some(c) = rest.next() {
            match (c, quote) {
                ('\\', _) => word.extend(rest.next()),
                (c, Some(q)) if c == q => quote = None,
                (c @ ('"' | '\''), None) => quote = Some(c),
                (c, None) if c.is_whitespace() => break,
                (c, _) => word.push(c),
            }
        }
        if quote.is_some() {
            return None;
        }
        if !word.is_empty() {
            let (key, value) = word.split_once('=')?;
            if key.is_empty() {
                return None;
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
    }
    Some(pairs)
}

#[cfg(test)]
mod tests {
    use oci_spec::image::Config;

    use super::*;

    fn applied(changes: &[&str]) -> Result<Config> {
        let mut image = ImageConfiguration::default();
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        apply(&mut image, &changes)?;
        Ok(image.config().clone().unwrap_or_default())
    }

    #[test]
    fn instructions_change_the_config_as_a_dockerfile_would() {
        let config = applied(&[
            "CMD [\"a\", \"b c\"]",
            "ENTRYPOINT run it",
            "ENV A=1 B=\"2 3\"",
            "env A 4",
            "EXPOSE 80 53/udp",
            "LABEL x=y",
            "USER nobody",
            "VOLUME /data /more",
            "WORKDIR /srv",
            "STOPSIGNAL SIGINT",
        ])
        .unwrap();
        assert_eq!(config.cmd().as_deref().unwrap(), ["a", "b c"]);
        assert_eq!(config.entrypoint().as_deref().unwrap(), ["/bin/sh", "-c", "run it"]);
        assert_eq!(config.env().as_deref().unwrap(), ["B=2 3", "A=4"]);
        assert_eq!(config.exposed_ports().as_deref().unwrap(), ["53/udp", "80/tcp"]);
        assert_eq!(config.labels().as_ref().unwrap()["x"], "y");
        assert_eq!(config.user().as_deref(), Some("nobody"));
        assert_eq!(config.volumes().as_deref().unwrap(), ["/data", "/more"]);
        assert_eq!(config.working_dir().as_deref(), Some("/srv"));
        assert_eq!(config.stop_signal().as_deref(), Some("SIGINT"));
    }

    #[test]
    fn what_is_no_instruction_is_refused() {
        for change in ["", "RUN x", "CMD", "ENV =x", "ENV A=\"1", "EXPOSE 0", "EXPOSE 80/sctp", "LABEL a"] {
            assert_eq!(
                BackendError::from(applied(&[change]).unwrap_err()).kind(),
                ErrorKind::Invalid,
                "{change}"
            );
        }
    }
}
