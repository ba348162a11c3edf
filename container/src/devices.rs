//! Devices of the host in a container: those that every container has, `--device`, and all for `--privileged`.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use crate::runtime::RuntimeError;

/// What a container's devices are made and allowed from.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Devices {
    /// Nodes to make beside the default ones.
    pub(crate) nodes: Vec<LinuxDevice>,
    /// What of all devices may be used; everything else is denied. `None` denies nothing.
    pub(crate) rules: Option<Vec<LinuxDeviceCgroup>>,
}

/// What every container may use, as (kind, major, minor, access): making nodes of any device (which alone does not
/// open them), null, zero, full, random, urandom, tty, console, ptmx and terminals.
const DEFAULT_RULES: [(LinuxDeviceType, Option<i64>, Option<i64>, &str); 11] = [
    (LinuxDeviceType::C, None, None, "m"),
    (LinuxDeviceType::B, None, None, "m"),
    (LinuxDeviceType::C, Some(1), Some(3), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(5), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(7), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(8), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(9), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(0), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(1), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(2), "rwm"),
    (LinuxDeviceType::C, Some(136), None, "rwm"),
];

/// Names in `/dev` that a container has of its own.
const OWN: [&str; 12] =
    ["pts", "shm", "mqueue", "fd", "console", "ptmx", "null", "zero", "full", "tty", "random", "urandom"];

/// The devices of a container with the settings `wanted` (`path[:path-in-container[:rwm]]`).
///
/// # Errors
/// [`RuntimeError::Invalid`] for what is no device or makes no sense.
pub(crate) fn resolve(wanted: &[String], privileged: bool) -> Result<Devices, RuntimeError> {
    let mut nodes = Vec::new();
    if privileged {
        collect(Path::new("/dev"), Path::new("/dev"), &mut nodes);
    }
    let mut rules: Vec<LinuxDeviceCgroup> = DEFAULT_RULES
        .into_iter()
        .map(|(kind, major, minor, access)| rule(kind, major, minor, access))
        .collect();
    for text in wanted {
        let (host, inside, access) = parse(text)?;
        let mut found = Vec::new();
        match device(&host, &inside) {
            Some(node) => found.push(node),
            None if host.is_dir() => collect(&host, &inside, &mut found),
            None => {}
        }
        if found.is_empty() {
            return Err(RuntimeError::Invalid(format!(
                "`{}` is neither a device nor a directory of devices",
                host.display()
            )));
        }
        rules.extend(
            found.iter().map(|node| rule(node.typ(), Some(node.major()), Some(node.minor()), access)),
        );
        nodes.retain(|node: &LinuxDevice| found.iter().all(|other| other.path() != node.path()));
        nodes.append(&mut found);
    }
    Ok(Devices { nodes, rules: (!privileged).then_some(rules) })
}

/// A rule as the device controller of v1 reads it.
pub(crate) fn v1_line(rule: &LinuxDeviceCgroup) -> String {
    let number = |number: Option<i64>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
    let kind = rule.typ().unwrap_or_default();
    let access = rule.access().as_deref().unwrap_or("rwm");
    format!("{} {}:{} {access}", kind.as_str(), number(rule.major()), number(rule.minor()))
}

fn rule(kind: LinuxDeviceType, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(kind)
        .access(access)
        .build()
        .unwrap_or_else(|_| LinuxDeviceCgroup::default());
    rule.set_major(major).set_minor(minor);
    rule
}

fn parse(text: &str) -> Result<(PathBuf, PathBuf, &str), RuntimeError> {
    let wrong = || {
        RuntimeError::Invalid(format!(
            "`{text}` is not a device (path[:path-in-container[:rwm]], below /dev inside)"
        ))
    };
    let is_access = |text: &str| !text.is_empty() && text.bytes().all(|byte| b"rwm".contains(&byte));
    let parts: Vec<&str> = text.split(':').collect();
    let (host, inside, access) = match parts[..] {
        [host] => (host, host, "rwm"),
        [host, access] if is_access(access) => (host, host, access),
        [host, inside] => (host, inside, "rwm"),
        [host, inside, access] if is_access(access) => (host, inside, access),
        _ => return Err(wrong()),
    };
    let plain = |path: &str| path.starts_with('/') && !path.split('/').any(|part| part == "..");
    // The runtimes make nodes below /dev only.
    if !plain(host)
        || !plain(inside)
        || !Path::new(inside).starts_with("/dev")
        || Path::new(inside) == Path::new("/dev")
    {
        return Err(wrong());
    }
    Ok((host.into(), inside.into(), access))
}

/// The device at `host`, to be made at `inside`.
fn device(host: &Path, inside: &Path) -> Option<LinuxDevice> {
    let metadata = fs::metadata(host).ok()?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    LinuxDeviceBuilder::default()
        .path(inside)
        .typ(kind)
        .major(i64::from(rustix::fs::major(metadata.rdev())))
        .minor(i64::from(rustix::fs::minor(metadata.rdev())))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .ok()
}

/// All devices below the directory `host`, to be made below `inside`; links are not followed.
fn collect(host: &Path, inside: &Path, nodes: &mut Vec<LinuxDevice>) {
    let mut entries: Vec<fs::DirEntry> = fs::read_dir(host).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let own = host == Path::new("/dev") && OWN.iter().any(|name| entry.file_name() == *name);
        let Ok(kind) = entry.file_type() else { continue };
        let inside = inside.join(entry.file_name());
        if own || kind.is_symlink() {
        } else if kind.is_dir() {
            collect(&entry.path(), &inside, nodes);
        } else {
            nodes.extend(device(&entry.path(), &inside));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_given_as_docker_takes_them() {
        let found = |text: &str| {
            let devices = resolve(&[text.to_owned()], false).unwrap();
            let rules = devices.rules.unwrap();
            (devices.nodes[0].path().clone(), v1_line(rules.last().unwrap()))
        };
        let cases = [
            ("/dev/null", "/dev/null", "c 1:3 rwm"),
            ("/dev/null:r", "/dev/null", "c 1:3 r"),
            ("/dev/null:/dev/hole", "/dev/hole", "c 1:3 rwm"),
            ("/dev/zero:/dev/deep/hole:rw", "/dev/deep/hole", "c 1:5 rw"),
        ];
        for (text, path, line) in cases {
            assert_eq!(found(text), (path.into(), line.to_owned()), "{text}");
        }
        let wrong = [
            "",
            "null",
            "/dev/null:x:y:z",
            "/dev/null:/etc/x",
            "/dev/null:/dev/../x",
            "/dev/null:/dev/x:q",
            "/etc/passwd:/dev/x",
            "/dev/null:/dev",
        ];
        for text in wrong {
            assert!(matches!(resolve(&[text.to_owned()], false), Err(RuntimeError::Invalid(_))), "{text}");
        }
    }

    #[test]
    fn privileged_containers_have_the_hosts_devices_and_no_rules() {
        let devices = resolve(&[], true).unwrap();
        assert_eq!(devices.rules, None);
        assert!(devices.nodes.iter().all(|node| node.path() != Path::new("/dev/null")));
    }
}
