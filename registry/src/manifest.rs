//! Manifests and indexes: reading them, choosing a platform, and what their media types mean.

use kiln_contract::{Digest, Platform};
use kiln_store::{Image, Store};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;

use crate::{RegistryError, Result};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// What is asked for in `Accept`.
pub(crate) const ACCEPT: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];

/// Registries must take manifests of 4 MiB (distribution-spec 1.1), and few take more; twice that is read.
pub(crate) const MANIFEST_LIMIT: u64 = 8 << 20;
/// Configs of images with very many layers reach some hundred kilobytes.
pub(crate) const CONFIG_LIMIT: u64 = 16 << 20;

/// A document that a reference leads to.
#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Box<ImageManifest>),
    Index(Box<ImageIndex>),
}

/// What all kinds of manifests have, to tell them apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    #[serde(default)]
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a manifest or an index, by what it says itself. What the sender calls it (`Content-Type`) may not
    /// decide: the digest covers the content alone.
    pub(crate) fn parse(bytes: &[u8], name: &str) -> Result<Self> {
        let invalid = |what, error: serde_json::Error| RegistryError::Invalid {
            what,
            name: name.into(),
            reason: error.to_string(),
        };
        let kind: Kind = serde_json::from_slice(bytes).map_err(|error| invalid("manifest", error))?;
        let unsupported =
            |reason: &str| Err(RegistryError::Unsupported { name: name.into(), reason: reason.into() });
        if kind.schema_version == 1 {
            return unsupported(
                "its manifest is of schema 1, which Docker gave up in 2019; push it again with a current tool",
            );
        }
        match (&kind.manifests, &kind.config) {
            (Some(_), Some(_)) => unsupported("its manifest is also an index"),
            (Some(_), None) => serde_json::from_slice(bytes)
                .map(|index| Self::Index(Box::new(index)))
                .map_err(|error| invalid("index", error)),
            (None, Some(_)) => serde_json::from_slice(bytes)
                .map(|manifest| Self::Manifest(Box::new(manifest)))
                .map_err(|error| invalid("manifest", error)),
            (None, None) => {
                let kind = kind.media_type.unwrap_or_else(|| "without a media type".into());
                unsupported(&format!(
                    "it is neither an image manifest nor an index ({})",
                    crate::answer::printable(&kind)
                ))
            }
        }
    }
}

/// The image for `wanted` in an index: the first that fits, one with exactly the wanted variant before others.
pub(crate) fn choose<'a>(index: &'a ImageIndex, wanted: &Platform, name: &str) -> Result<&'a Descriptor> {
    let mut available = Vec::new();
    let mut fitting = Vec::new();
    for descriptor in index.manifests() {
        let Some(platform) = descriptor.platform() else {
            // An index with one image often does not say for which platform it is; its config does.
            if index.manifests().len() == 1 {
                fitting.push((false, descriptor));
            }
            continue;
        };
        let platform = Platform {
            os: platform.os().to_string(),
            architecture: platform.architecture().to_string(),
            variant: platform.variant().clone(),
        };
        // Attestations stand in indexes as images for this.
        if platform.os == "unknown" {
            continue;
        }
        if platform.satisfies(wanted) {
            fitting.push((platform == *wanted, descriptor));
        }
        let text = platform.to_string();
        if !available.contains(&text) {
            available.push(text);
        }
    }
    let best = fitting.iter().find(|(exact, _)| *exact).or(fitting.first());
    best.map(|(_, descriptor)| *descriptor).ok_or_else(|| RegistryError::NoPlatform {
        name: name.into(),
        wanted: wanted.clone(),
        available,
    })
}

/// The manifest of `image` with `layers` (and their media types): its own if they are the ones it names, byte for byte; else a
/// new one. With its media type.
pub(crate) fn with_layers(
    store: &Store,
    image: &Image,
    layers: &[Descriptor],
    config_size: u64,
) -> Result<(String, Vec<u8>)> {
    let own = &image.manifest;
    let invalid =
        |reason: String| RegistryError::Invalid { what: "manifest", name: image.id.to_string(), reason };
    if own.layers().iter().map(Descriptor::digest).eq(layers.iter().map(Descriptor::digest)) {
        let media_type = own.media_type().as_ref().map_or(OCI_MANIFEST.to_owned(), ToString::to_string);
        let bytes = store.blob(&image.manifest_digest)?;
        return Ok((media_type, bytes.ok_or_else(|| invalid("it is not in the store".into()))?));
    }
    let mut new = own.clone();
    new.set_media_type(Some(MediaType::ImageManifest));
    new.set_config(descriptor(MediaType::ImageConfig, &image.id, config_size));
    let layers = layers.iter().cloned().map(|mut layer| {
        // An OCI manifest has OCI's layers, whatever the one before had.
        if let Some(compression) = compression_of(layer.media_type()) {
            layer.set_media_type(layer_media_type(compression));
        }
        layer
    });
    new.set_layers(layers.collect());
    // Annotations come in any order; as a value they are sorted, so that the same image has the same manifest.
    let bytes = if new.layers().iter().any(|layer| layer.annotations().is_some()) {
        serde_json::to_value(&new).and_then(|value| serde_json::to_vec(&value))
    } else {
        serde_json::to_vec(&new)
    };
    let bytes = bytes.map_err(|error| invalid(error.to_string()))?;
    Ok((OCI_MANIFEST.into(), bytes))
}

/// The platform that a config is for.
pub(crate) fn platform_of(config: &ImageConfiguration) -> Platform {
    Platform {
        os: config.os().to_string(),
        architecture: config.architecture().to_string(),
        variant: config.variant().clone(),
    }
}

/// Reads a config, and checks that it fits its manifest and the platform that was asked for.
pub(crate) fn parse_config(
    bytes: &[u8],
    manifest: &ImageManifest,
    wanted: Option<&Platform>,
    name: &str,
) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let config: ImageConfiguration = serde_json::from_slice(bytes).map_err(|error| {
        let kind = manifest.config().media_type();
        if matches!(kind, MediaType::ImageConfig) || kind.as_ref() == DOCKER_CONFIG {
            RegistryError::Invalid { what: "config", name: name.into(), reason: error.to_string() }
        } else {
            let kind = crate::answer::printable(kind.as_ref());
            RegistryError::Unsupported {
                name: name.into(),
                reason: format!("it is an artifact and no image ({kind})"),
            }
        }
    })?;
    let layers = manifest.layers().len();
    let texts = config.rootfs().diff_ids();
    if texts.len() != layers {
        return Err(RegistryError::LayerCount { name: name.into(), layers, diff_ids: texts.len() });
    }
    if let Some(wanted) = wanted {
        let is = platform_of(&config);
        if !is.satisfies(wanted) {
            return Err(RegistryError::NoPlatform {
                name: name.into(),
                wanted: wanted.clone(),
                available: vec![is.to_string()],
            });
        }
    }
    let diff_ids = texts.iter().map(|text| digest(text, "diff_id", name)).collect::<Result<_>>()?;
    Ok((config, diff_ids))
}

/// A digest from a document.
pub(crate) fn digest(text: &str, what: &'static str, name: &str) -> Result<Digest> {
    text.parse().map_err(|error: kiln_contract::DigestError| {
        let reason = crate::answer::printable(&error.to_string());
        if text.starts_with("sha512:") || text.starts_with("sha384:") {
            RegistryError::Unsupported {
                name: name.into(),
                reason: format!("a {what} is not a SHA-256 digest"),
            }
        } else {
            RegistryError::Invalid { what, name: name.into(), reason }
        }
    })
}

/// The digest of a descriptor.
pub(crate) fn descriptor_digest(descriptor: &Descriptor, name: &str) -> Result<Digest> {
    digest(descriptor.digest().as_ref(), "digest", name)
}

/// A descriptor of `bytes` bytes.
pub(crate) fn descriptor(media_type: MediaType, digest: &Digest, bytes: u64) -> Descriptor {
    let parsed: oci_spec::image::Sha256Digest =
        digest.hex().parse().unwrap_or_else(|_| unreachable!("64 hex digits are a SHA-256 digest"));
    Descriptor::new(media_type, bytes, parsed)
}

/// How a layer is packed, as its media type says; `None` for what is no layer of files.
pub(crate) fn compression_of(media_type: &MediaType) -> Option<crate::Compression> {
    use crate::Compression::{Gzip, None as Plain, Zstd};
    match media_type {
        MediaType::ImageLayer | MediaType::ImageLayerNonDistributable => Some(Plain),
        MediaType::ImageLayerGzip | MediaType::ImageLayerNonDistributableGzip => Some(Gzip),
        MediaType::ImageLayerZstd | MediaType::ImageLayerNonDistributableZstd => Some(Zstd),
        other => match other.as_ref() {
            DOCKER_LAYER => Some(Plain),
            DOCKER_LAYER_GZIP => Some(Gzip),
            DOCKER_LAYER_ZSTD => Some(Zstd),
            _ => None,
        },
    }
}

/// The OCI media type of a layer packed so.
pub(crate) fn layer_media_type(compression: crate::Compression) -> MediaType {
    match compression {
        crate::Compression::Gzip => MediaType::ImageLayerGzip,
        crate::Compression::Zstd => MediaType::ImageLayerZstd,
        crate::Compression::None => MediaType::ImageLayer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[&str]) -> ImageIndex {
        let manifests: Vec<serde_json::Value> = platforms
            .iter()
            .enumerate()
            .map(|(n, text)| {
                let mut entry = serde_json::json!({
                    "mediaType": OCI_MANIFEST, "size": n, "digest": format!("sha256:{:064x}", n),
                });
                let parts: Vec<&str> = text.split('/').collect();
                if parts.len() > 1 {
                    entry["platform"] = serde_json::json!({"os": parts[0], "architecture": parts[1]});
                }
                if parts.len() > 2 {
                    entry["platform"]["variant"] = parts[2].into();
                }
                entry
            })
            .collect();
        let text = serde_json::json!({"schemaVersion": 2, "manifests": manifests}).to_string();
        match Document::parse(text.as_bytes(), "x").unwrap() {
            Document::Index(index) => *index,
            Document::Manifest(_) => panic!("an index was read as a manifest"),
        }
    }

    #[test]
    fn the_platform_that_fits_best_is_chosen() {
        let arms = ["linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "linux/amd64", "unknown/unknown"];
        for (platforms, wanted, expected) in [
            (&arms[..], "linux/amd64", 3),
            (&arms, "linux/arm64", 2),
            (&arms, "linux/arm/v7", 1),
            (&arms, "linux/arm", 0),
            (&[""], "linux/amd64", 0),
        ] {
            let index = index(platforms);
            let chosen = choose(&index, &wanted.parse().unwrap(), "x").unwrap();
            assert_eq!(chosen.size(), expected, "{wanted}");
        }
    }

    #[test]
    fn a_missing_platform_says_what_there_is() {
        let index = index(&["linux/arm64/v8", "windows/amd64", "unknown/unknown", "linux/arm64/v8"]);
        let error = choose(&index, &"linux/amd64".parse().unwrap(), "a.test/b:1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "`a.test/b:1` has no image for linux/amd64; it has linux/arm64/v8, windows/amd64"
        );
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        for (text, part) in [
            ("{", "manifest of `n` cannot be read"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1"),
            (r#"{"schemaVersion":2}"#, "neither"),
            (r#"{"schemaVersion":2,"config":{},"manifests":[]}"#, "also an index"),
            (r#"{"schemaVersion":2,"config":{"x":1},"layers":[]}"#, "manifest of `n` cannot be read"),
        ] {
            let error = Document::parse(text.as_bytes(), "n").unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn layers_and_diff_ids_must_be_as_many() {
        let descriptor =
            |n: u8| format!(r#"{{"mediaType":"{OCI_MANIFEST}","size":1,"digest":"sha256:{n:064x}"}}"#);
        let manifest =
            format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, descriptor(0), descriptor(1));
        let Document::Manifest(manifest) = Document::parse(manifest.as_bytes(), "n").unwrap() else {
            panic!()
        };
        let config = r#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}"#;
        let error = parse_config(config.as_bytes(), &manifest, None, "n").unwrap_err();
        assert!(matches!(error, RegistryError::LayerCount { layers: 1, diff_ids: 0, .. }), "{error}");
    }
}
