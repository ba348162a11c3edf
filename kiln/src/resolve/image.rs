//! The settings that an image brings along.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use super::{ResolveError, Result};

/// The `config` object of an image's config (OCI image-spec 1.1, config.md), with Docker's `Healthcheck` and
/// `Shell` besides, which OCI's own types leave out. Fields that are absent or null are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct ImageSettings {
    #[serde(deserialize_with = "or_empty")]
    pub(crate) user: String,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) env: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) cmd: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) working_dir: String,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) volumes: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) exposed_ports: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) stop_signal: String,
    pub(crate) healthcheck: Option<ImageHealthCheck>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) shell: Vec<String>,
}

/// Docker's `Healthcheck`: durations in nanoseconds, 0 is «not said».
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct ImageHealthCheck {
    #[serde(deserialize_with = "or_empty")]
    pub(crate) test: Vec<String>,
    pub(crate) interval: u64,
    pub(crate) timeout: u64,
    pub(crate) start_period: u64,
    pub(crate) start_interval: u64,
    pub(crate) retries: u32,
}

impl ImageSettings {
    /// Reads an image's config blob.
    pub(crate) fn read(image: &str, config: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Whole {
            config: Option<ImageSettings>,
        }
        let whole: Whole = serde_json::from_slice(config)
            .map_err(|source| ResolveError::Config { image: image.to_owned(), source })?;
        Ok(whole.config.unwrap_or_default())
    }
}

fn or_empty<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_with_nulls_and_absent_fields() {
        let text = br#"{"os":"linux","config":{"Env":["A=1"],"Entrypoint":null,"Cmd":["sh"],"Volumes":{"/data":{}},
            "ExposedPorts":{"80/tcp":{}},"Labels":null,"Healthcheck":{"Test":["CMD-SHELL","true"],"Interval":5000000000}}}"#;
        let settings = ImageSettings::read("x", text).unwrap();
        assert_eq!(settings.env, ["A=1"]);
        assert_eq!(settings.cmd, ["sh"]);
        assert!(settings.entrypoint.is_empty() && settings.labels.is_empty());
        assert_eq!(settings.volumes.keys().collect::<Vec<_>>(), ["/data"]);
        assert_eq!(settings.healthcheck.unwrap().interval, 5_000_000_000);
        assert_eq!(ImageSettings::read("x", br#"{"config":null}"#).unwrap(), ImageSettings::default());
        assert_eq!(ImageSettings::read("x", b"{}").unwrap(), ImageSettings::default());
        assert!(ImageSettings::read("x", b"[").is_err());
    }
}
