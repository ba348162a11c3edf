//! `--volume`, `--mount`, `--tmpfs`, and the volumes that an image asks for.

use std::path::{Component, Path, PathBuf};

use kiln_contract::{ByteSize, MountKind, MountSpec, TmpfsOptions};

use super::{Host, ImageSettings, ResolveError, Result};

const VOLUME: &str = "--volume";
const MOUNT: &str = "--mount";
const TMPFS: &str = "--tmpfs";
const PROPAGATIONS: [&str; 6] = ["private", "rprivate", "shared", "rshared", "slave", "rslave"];

/// What was typed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Typed<'a> {
    pub(crate) volumes: &'a [String],
    pub(crate) mounts: &'a [String],
    pub(crate) tmpfs: &'a [String],
}

/// All mounts of a workload, in the order of flags; then an anonymous volume for each path that the image
/// declares and nobody mounts over. Two mounts at one path are an error.
pub(crate) fn mounts(image: &ImageSettings, typed: Typed<'_>, host: &Host<'_>) -> Result<Vec<MountSpec>> {
    let mut all = Vec::new();
    for text in typed.volumes {
        all.push(volume(text, host)?);
    }
    for text in typed.mounts {
        all.push(mount(text, host)?);
    }
    for text in typed.tmpfs {
        all.push(tmpfs(text)?);
    }
    for (index, one) in all.iter().enumerate() {
        if all[..index].iter().any(|other| other.target == one.target) {
            return Err(ResolveError::Conflict(format!("two mounts at one path: {}", one.target)));
        }
    }
    for path in image.volumes.keys() {
        let Some(target) = normal_target(path) else { continue };
        if !all.iter().any(|other| other.target == target) {
            let kind = MountKind::Volume { name: None, copy: true };
            all.push(MountSpec { kind, target, read_only: false });
        }
    }
    Ok(all)
}

/// `[source:]target[:options]`.
fn volume(text: &str, host: &Host<'_>) -> Result<MountSpec> {
    let bad = |why: &str| ResolveError::value(VOLUME, text, why);
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [source, target] => (Some(source), target, ""),
        [source, target, options] => (Some(source), target, options),
        _ => return Err(bad("it has more than three parts between colons")),
    };
    let target = normal_target(target)
        .ok_or_else(|| bad("the path in the container must be absolute, and not `/`"))?;
    let mut read_only = false;
    let mut copy = true;
    let mut propagation = None;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" | "readonly" => read_only = true,
            "nocopy" => copy = false,
            // SELinux labels and Docker Desktop's caching hints mean nothing here.
            "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" => {}
            _ if PROPAGATIONS.contains(&option) => propagation = Some(option.to_owned()),
            _ => {
                return Err(bad(&format!(
                    "`{option}` is not an option (ro, rw, nocopy, {})",
                    PROPAGATIONS.join(", ")
                )));
            }
        }
    }
    let kind = match source {
        None => MountKind::Volume { name: None, copy },
        Some("") => return Err(bad("the part before the first colon is empty")),
        Some(source) if is_path(source) => {
            MountKind::Bind { source: host_path(VOLUME, source, host)?, create: true, propagation }
        }
        Some(name) => MountKind::Volume { name: Some(volume_name(name).map_err(|why| bad(&why))?), copy },
    };
    Ok(MountSpec { kind, target, read_only })
}

/// `type=bind,source=/a,target=/b,readonly`.
fn mount(text: &str, host: &Host<'_>) -> Result<MountSpec> {
    let bad = |why: &str| ResolveError::value(MOUNT, text, why);
    let (mut kind, mut source, mut target, mut read_only) = ("volume".to_owned(), None, None, false);
    let (mut propagation, mut copy, mut tmpfs) = (None, true, TmpfsOptions::default());
    for field in csv(text) {
        let (key, value) =
            field.split_once('=').map_or((field.as_str(), None), |(key, value)| (key, Some(value)));
        let needed =
            || value.filter(|value| !value.is_empty()).ok_or_else(|| bad(&format!("`{key}` needs a value")));
        let switch = || match value {
            None | Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(_) => Err(bad(&format!("`{key}` is true or false"))),
        };
        match key {
            "type" => kind = needed()?.to_owned(),
            "source" | "src" => source = Some(needed()?.to_owned()),
            "target" | "destination" | "dst" => target = Some(needed()?.to_owned()),
            "readonly" | "ro" => read_only = switch()?,
            "bind-propagation" => match needed()? {
                mode if PROPAGATIONS.contains(&mode) => propagation = Some(mode.to_owned()),
                _ => return Err(bad(&format!("bind-propagation is one of {}", PROPAGATIONS.join(", ")))),
            },
            "bind-nonrecursive" | "consistency" => {}
            "volume-nocopy" => copy = !switch()?,
            "tmpfs-size" => tmpfs.size = Some(needed()?.parse().map_err(|error| bad(&format!("{error}")))?),
            "tmpfs-mode" => {
                tmpfs.mode = Some(mode(needed()?).ok_or_else(|| bad("tmpfs-mode is an octal number"))?);
            }
            _ => {
                return Err(bad(&format!(
                    "`{key}` is not a key (type, source, target, readonly, bind-propagation, volume-nocopy, tmpfs-size, tmpfs-mode)"
                )));
            }
        }
    }
    let target = target.ok_or_else(|| bad("it needs a target"))?;
    let target = normal_target(&target).ok_or_else(|| bad("the target must be absolute, and not `/`"))?;
    let kind = match (kind.as_str(), source) {
        ("bind", Some(source)) => {
            MountKind::Bind { source: host_path(MOUNT, &source, host)?, create: false, propagation }
        }
        ("bind", None) => return Err(bad("a bind needs a source")),
        ("volume", source) => {
            let name = source.map(|name| volume_name(&name).map_err(|why| bad(&why))).transpose()?;
            MountKind::Volume { name, copy }
        }
        ("tmpfs", None) => MountKind::Tmpfs(tmpfs),
        ("tmpfs", Some(_)) => return Err(bad("a tmpfs has no source")),
        (other, _) => return Err(bad(&format!("`{other}` is not a type (bind, volume, tmpfs)"))),
    };
    Ok(MountSpec { kind, target, read_only })
}

/// `target[:options]`.
fn tmpfs(text: &str) -> Result<MountSpec> {
    let bad = |why: &str| ResolveError::value(TMPFS, text, why);
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    let target = normal_target(target)
        .ok_or_else(|| bad("the path in the container must be absolute, and not `/`"))?;
    let mut all = TmpfsOptions::default();
    let mut read_only = false;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => {
                all.size = Some(size.parse::<ByteSize>().map_err(|error| bad(&error.to_string()))?);
            }
            Some(("mode", text)) => {
                all.mode = Some(mode(text).ok_or_else(|| bad("the mode is an octal number"))?);
            }
            None if option == "ro" => read_only = true,
            None if option == "rw" => {}
            _ => all.options.push(option.to_owned()),
        }
    }
    Ok(MountSpec { kind: MountKind::Tmpfs(all), target, read_only })
}

/// What begins like a path is one; anything else is a volume's name.
fn is_path(source: &str) -> bool {
    source.starts_with(['/', '.', '~'])
}

fn host_path(flag: &'static str, source: &str, host: &Host<'_>) -> Result<PathBuf> {
    let source = match (source.strip_prefix('~'), &host.home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            home.join(rest.trim_start_matches('/'))
        }
        _ => PathBuf::from(source),
    };
    Ok(clean(&host.absolute(flag, &source)?))
}

/// The path without `.` and `..` (by text, as Docker does).
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

fn normal_target(path: &str) -> Option<String> {
    let clean = path.starts_with('/').then(|| clean(Path::new(path)))?;
    clean.to_str().filter(|text| *text != "/").map(str::to_owned)
}

fn volume_name(name: &str) -> std::result::Result<String, String> {
    super::names::is_name(name).then(|| name.to_owned()).ok_or_else(|| {
        format!(
            "`{name}` is not a volume's name ([a-zA-Z0-9][a-zA-Z0-9_.-]*); a path begins with `/` or `./`"
        )
    })
}

fn mode(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

/// Fields between commas; a field in double quotes may hold commas.
fn csv(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    for c in text.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            _ => fields.last_mut().into_iter().for_each(|field| field.push(c)),
        }
    }
    fields.retain(|field| !field.is_empty());
    fields
}

#[cfg(test)]
mod tests {
    use super::super::testing::with_host;
    use super::*;

    fn bind(source: &str, target: &str, read_only: bool, create: bool) -> MountSpec {
        let kind = MountKind::Bind { source: source.into(), create, propagation: None };
        MountSpec { kind, target: target.into(), read_only }
    }

    fn named(name: Option<&str>, target: &str, read_only: bool, copy: bool) -> MountSpec {
        let kind = MountKind::Volume { name: name.map(str::to_owned), copy };
        MountSpec { kind, target: target.into(), read_only }
    }

    #[test]
    fn volumes_read_as_docker_reads_them() {
        let table = [
            ("/a:/b", bind("/a", "/b", false, true)),
            ("/a:/b:ro", bind("/a", "/b", true, true)),
            (".:/src", bind("/work", "/src", false, true)),
            ("./x/../y:/src/", bind("/work/y", "/src", false, true)),
            ("../up:/src", bind("/up", "/src", false, true)),
            ("~/x:/src", bind("/home/me/x", "/src", false, true)),
            ("~:/src:rw,z", bind("/home/me", "/src", false, true)),
            ("data:/b", named(Some("data"), "/b", false, true)),
            ("data:/b:ro,nocopy", named(Some("data"), "/b", true, false)),
            ("/b", named(None, "/b", false, true)),
        ];
        for (text, expected) in table {
            assert_eq!(with_host(&[], |host| volume(text, host)).unwrap(), expected, "{text}");
        }
        for text in ["", "a", "/a:", "/a:b", ":/b", "/a:/", "/a:/b:fast", "a/b:/c", "/a:/b:ro:rw", "-x:/b"] {
            assert!(with_host(&[], |host| volume(text, host)).is_err(), "{text}");
        }
        let one_dash = with_host(&[], |host| volume("m", host)).unwrap_err();
        assert!(one_dash.hint().unwrap().contains("`--vm`"));
    }

    #[test]
    fn mounts_read_as_docker_reads_them() {
        let tmpfs = MountKind::Tmpfs(TmpfsOptions {
            size: Some(ByteSize(1 << 20)),
            mode: Some(0o700),
            options: vec![],
        });
        let table = [
            ("type=bind,source=/a,target=/b", bind("/a", "/b", false, false)),
            ("type=bind,src=./a,dst=/b,readonly", bind("/work/a", "/b", true, false)),
            ("type=bind,\"src=/a,b\",dst=/b,ro=false", bind("/a,b", "/b", false, false)),
            ("source=data,target=/b,volume-nocopy", named(Some("data"), "/b", false, false)),
            ("type=volume,target=/b", named(None, "/b", false, true)),
            (
                "type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=700",
                MountSpec { kind: tmpfs, target: "/t".into(), read_only: false },
            ),
        ];
        for (text, expected) in table {
            assert_eq!(with_host(&[], |host| mount(text, host)).unwrap(), expected, "{text}");
        }
        for text in [
            "",
            "type=bind,target=/b",
            "type=bind,source=/a",
            "type=x,target=/b",
            "type=tmpfs,source=a,target=/b",
            "target=b",
            "target=/b,colour=red",
            "type=tmpfs,target=/b,tmpfs-mode=9",
        ] {
            assert!(with_host(&[], |host| mount(text, host)).is_err(), "{text}");
        }
    }

    #[test]
    fn tmpfs_options_that_are_not_ours_are_passed_on() {
        let got = tmpfs("/run:rw,noexec,size=64m,mode=1777,uid=5").unwrap();
        let options = TmpfsOptions {
            size: Some(ByteSize(64 << 20)),
            mode: Some(0o1777),
            options: vec!["noexec".into(), "uid=5".into()],
        };
        assert_eq!(
            got,
            MountSpec { kind: MountKind::Tmpfs(options), target: "/run".into(), read_only: false }
        );
        assert!(tmpfs("run").is_err() && tmpfs("/run:size=x").is_err());
    }

    #[test]
    fn volumes_of_the_image_are_anonymous_unless_something_is_mounted_there() {
        let settings: ImageSettings =
            serde_json::from_str(r#"{"Volumes":{"/data":{},"/other/":{},"relative":{}}}"#).unwrap();
        let flags = ["/a:/data".to_owned()];
        let typed = Typed { volumes: &flags, ..Default::default() };
        let got = with_host(&[], |host| mounts(&settings, typed, host)).unwrap();
        assert_eq!(got, [bind("/a", "/data", false, true), named(None, "/other", false, true)]);
    }

    #[test]
    fn two_mounts_at_one_path_are_refused() {
        let (volumes, tmpfs) = (["/a:/b".to_owned()], ["/b/".to_owned()]);
        let typed = Typed { volumes: &volumes, tmpfs: &tmpfs, ..Default::default() };
        let error = with_host(&[], |host| mounts(&ImageSettings::default(), typed, host)).unwrap_err();
        assert!(error.to_string().contains("/b"), "{error}");
    }
}
