//! An image and a layer on top of it become an image: what `commit` does, wherever the layer comes from.

use kiln_contract::{BackendError, CommitOptions, Digest, ErrorKind};
use oci_spec::image::{History, HistoryBuilder, ImageConfiguration};

use crate::{Image, ImageName, Store, StoreError};

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
            CommitError::Instruction { .. } | CommitError::Name(_) => ErrorKind::Invalid,
            CommitError::Store(_) | CommitError::Config(_) => ErrorKind::Failed,
        };
        let known = matches!(error, CommitError::Instruction { .. });
        let error = Self::caused("cannot commit", error).of_kind(kind);
        if known {
            error.hint("CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR are known")
        } else {
            error
        }
    }
}

/// What an image is made of.
#[derive(Debug)]
pub struct CommitRequest<'a> {
    /// The instance's name: for the history of the tags.
    pub name: &'a str,
    /// The image that it began as.
    pub image: Digest,
    /// The stack of that, bottom first, without mount points.
    pub layers: &'a [Digest],
    /// What ran: for the image's history.
    pub command: &'a [String],
    /// Names, message, author and instructions.
    pub options: &'a CommitOptions,
}

impl CommitRequest<'_> {
    /// Looks at everything that can be wrong before a layer is made: a wrong name must cost nothing.
    ///
    /// # Errors
    /// A name or an instruction that is none; an image that is not here.
    pub fn check(&self, store: &Store) -> Result<()> {
        self.tags()?;
        self.config(store).map(drop)
    }

    fn tags(&self) -> Result<Vec<ImageName>> {
        self.options.tags.iter().map(|tag| ImageName::parse(tag).map_err(CommitError::Name)).collect()
    }

    fn config(&self, store: &Store) -> Result<ImageConfiguration> {
        let image = store.image(&self.image)?.ok_or(CommitError::NoImage(self.image))?;
        let mut config = image.config;
        apply(&mut config, &self.options.changes)?;
        Ok(config)
    }
}

impl Store {
    /// Makes an image of another and a layer on top of it (`None`: nothing changed but the config), and gives it its names.
    ///
    /// # Errors
    /// As [`CommitRequest::check`], and those of the store.
    pub fn commit(&self, request: &CommitRequest<'_>, layer: Option<Digest>) -> Result<Image> {
        let (tags, mut config) = (request.tags()?, request.config(self)?);
        let options = request.options;
        let layers: Vec<Digest> = request.layers.iter().copied().chain(layer).collect();
        let now = jiff::Timestamp::now().to_string();
        let mut history: Vec<History> = config.history().clone().unwrap_or_default();
        let mut step = HistoryBuilder::default()
            .created(now.clone())
            .created_by(request.command.join(" "))
            .empty_layer(layer.is_none());
        if !options.message.is_empty() {
            step = step.comment(options.message.clone());
        }
        if !options.author.is_empty() {
            step = step.author(options.author.clone());
            config.set_author(Some(options.author.clone()));
        }
        history.push(step.build()?);
        config.set_history(Some(history));
        config.set_created(Some(now));
        let image = self.make_image(&config, &layers)?;
        for tag in &tags {
            self.tag(tag, &image.manifest_digest, &format!("commit of {}", request.name))?;
        }
        Ok(image)
    }
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
