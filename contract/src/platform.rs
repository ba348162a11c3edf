//! `os/arch[/variant]`, as OCI images name the machines that they run on.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A platform in OCI's words (image-spec 1.1, image-index.md; GOOS and GOARCH values).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v8`, `v7`, …
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this machine's processor: what a workload needs here, on macOS too.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: None }
    }

    /// Whether an image for `self` runs where `wanted` is asked for. A variant that one side does not name
    /// matches any, and `arm64` is `arm64/v8`.
    pub fn satisfies(&self, wanted: &Self) -> bool {
        let variant = |p: &Self| match (p.architecture.as_str(), p.variant.as_deref()) {
            ("arm64", None | Some("v8")) => None,
            (_, variant) => variant.map(str::to_owned),
        };
        self.os == wanted.os
            && self.architecture == wanted.architecture
            && match (variant(self), variant(wanted)) {
                (Some(a), Some(b)) => a == b,
                _ => true,
            }
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a platform (os/arch[/variant], for example linux/amd64)");
        let parts: Vec<&str> = text.split('/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return Err(bad());
        }
        let normal = |arch: &str| match arch {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            other => other.to_owned(),
        };
        match parts[..] {
            [arch] => Ok(Self { os: "linux".into(), architecture: normal(arch), variant: None }),
            [os, arch] => Ok(Self { os: os.into(), architecture: normal(arch), variant: None }),
            [os, arch, variant] => {
                Ok(Self { os: os.into(), architecture: normal(arch), variant: Some(variant.into()) })
            }
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_read_and_match() {
        let parse = |text: &str| text.parse::<Platform>().unwrap();
        assert_eq!(parse("aarch64"), parse("linux/arm64"));
        assert!(parse("linux/arm64/v8").satisfies(&parse("linux/arm64")));
        assert!(!parse("linux/arm/v6").satisfies(&parse("linux/arm/v7")));
        assert!(!parse("windows/amd64").satisfies(&parse("linux/amd64")));
        for text in ["", "/", "linux/", "a/b/c/d"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
