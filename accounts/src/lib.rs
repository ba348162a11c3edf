//! Who a workload runs as: names and numbers looked up in the image's own `/etc/passwd` and `/etc/group`. The same for
//! containers, by the supervisor, and for machines, by their guest.
//!
//! These files come from an image and are not trusted: they are opened below the root with `openat2` and
//! `RESOLVE_IN_ROOT`, so that no link leads out of it; what is not a regular file is as if it were not there; lines
//! that make no sense are passed over; no more than 4 MiB are read.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// More than any real user database, and little enough to hold.
const MOST: u64 = 4 << 20;

/// Why nobody was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccountError {
    /// A name that is not in the file.
    #[error("there is no user `{0}` in the image's /etc/passwd")]
    NoSuchUser(String),
    /// A name that is not in the file.
    #[error("there is no group `{0}` in the image's /etc/group")]
    NoSuchGroup(String),
    /// The root cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// What was read.
        path: PathBuf,
        /// The kernel's word.
        source: std::io::Error,
    },
}

/// A workload's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, sorted, each once.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell, absolute; `/bin/sh` where none is said.
    pub shell: String,
}

/// Resolves `user[:group]` and further groups in the root at `root`.
///
/// A number need not be in the files; a name must be. Without a group, the user's own from `/etc/passwd` is taken,
/// or 0, and the groups that list the user are supplementary; with a group they are not.
///
/// # Errors
/// [`AccountError`] for a name that is not there, or for a root that cannot be read.
pub fn resolve(root: &Path, user: &str, groups: &[String]) -> Result<User, AccountError> {
    let (name, group) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let passwd = read(root, "etc/passwd")?;
    let entry = passwd.lines().find_map(|line| {
        let entry = PasswdEntry::parse(line)?;
        (entry.name == name || name.parse() == Ok(entry.uid)).then_some(entry)
    });
    let number = |text: &str| text.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    let uid = match (&entry, number(name)) {
        (Some(entry), _) => entry.uid,
        (None, Some(uid)) => uid,
        (None, None) => {
            return Err(AccountError::NoSuchUser(name.to_owned()));
        }
    };
    let needs_groups = group.is_some_and(|group| number(group).is_none())
        || groups.iter().any(|group| number(group).is_none())
        || (group.is_none() && entry.is_some());
    let group_file = if needs_groups { read(root, "etc/group")? } else { String::new() };
    let find_group = |wanted: &str| {
        group_file
            .lines()
            .filter_map(GroupEntry::parse)
            .find(|entry| entry.name == wanted)
            .map(|entry| entry.gid)
            .or_else(|| number(wanted))
            .ok_or_else(|| AccountError::NoSuchGroup(wanted.to_owned()))
    };
    let gid = match group {
        Some(group) => find_group(group)?,
        None => entry.as_ref().map_or(0, |entry| entry.gid),
    };
    let mut supplementary = Vec::new();
    if let (None, Some(entry)) = (group, &entry) {
        let member = |group: &GroupEntry<'_>| group.members.split(',').any(|name| name == entry.name);
        supplementary
            .extend(group_file.lines().filter_map(GroupEntry::parse).filter(member).map(|group| group.gid));
    }
    for group in groups {
        supplementary.push(find_group(group)?);
    }
    supplementary.sort_unstable();
    supplementary.dedup();
    let absolute = |path: Option<&str>, other: &str| {
        path.filter(|path| path.starts_with('/')).unwrap_or(other).to_owned()
    };
    let home = absolute(entry.as_ref().map(|entry| entry.home), "/");
    let shell = absolute(entry.as_ref().map(|entry| entry.shell), "/bin/sh");
    Ok(User { uid, gid, groups: supplementary, home, shell })
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

impl<'a> PasswdEntry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let mut fields = fields.skip(1);
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let (home, shell) = (fields.nth(1).unwrap_or(""), fields.next().unwrap_or(""));
        Some(Self { name, uid, gid, home, shell: shell.trim_end() })
    }
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> GroupEntry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let mut fields = fields.skip(1);
        let gid = fields.next()?.parse().ok()?;
        Some(Self { name, gid, members: fields.next().unwrap_or("") })
    }
}

/// The text of a regular file below `root`; empty if there is none.
fn read(root: &Path, path: &str) -> Result<String, AccountError> {
    let failed = |source: std::io::Error| AccountError::Io { path: root.join(path), source };
    let directory =
        rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| failed(errno.into()))?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // Found before it is opened: to open a device node of the image's choice may do something by itself.
    let found = loop {
        match rustix::fs::openat2(&directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Ok(found) => break File::from(found),
            // The kernel gives up when something was renamed meanwhile (openat2(2)).
            Err(Errno::AGAIN) => {}
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => return Ok(String::new()),
            Err(errno) => return Err(failed(errno.into())),
        }
    };
    if !found.metadata().map_err(failed)?.is_file() {
        return Ok(String::new());
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        broken line\n\
        :x:7:7::/:\n\
        www:x:33:33:www:/var/www:/bin/false\n\
        1000:x:5:5:a number for a name:/five:\n\
        app:x:1000:1001::relative:\n\
        huge:x:99999999999:1::/:\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\nextra:x:50:www,root\nmore:x:40:www\nnot a group\n";

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), PASSWD).unwrap();
        fs::write(root.path().join("etc/group"), GROUP).unwrap();
        root
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let root = root();
        let user = |uid, gid, groups: &[u32], home: &str| User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.into(),
            shell: if home == "/var/www" { "/bin/false" } else { "/bin/sh" }.into(),
        };
        let cases: [(&str, &[&str], User); 11] = [
            ("", &[], user(0, 0, &[50], "/root")),
            ("root", &[], user(0, 0, &[50], "/root")),
            ("www", &[], user(33, 33, &[40, 50], "/var/www")),
            ("33", &["7", "more", "7"], user(33, 33, &[7, 40, 50], "/var/www")),
            ("www:more", &[], user(33, 40, &[], "/var/www")),
            ("www:77", &[], user(33, 77, &[], "/var/www")),
            ("www:", &[], user(33, 33, &[40, 50], "/var/www")),
            (":more", &[], user(0, 40, &[], "/root")),
            ("1000", &[], user(5, 5, &[], "/five")),
            ("app", &[], user(1000, 1001, &[], "/")),
            ("4242:4243", &[], user(4242, 4243, &[], "/")),
        ];
        for (text, groups, expected) in cases {
            let groups: Vec<String> = groups.iter().map(|&group| group.to_owned()).collect();
            assert_eq!(resolve(root.path(), text, &groups).unwrap(), expected, "{text}");
        }
        for wrong in ["nobody", "www:nogroup", "-1", "4294967295", "huge", "root:-1"] {
            assert!(
                matches!(
                    resolve(root.path(), wrong, &[]),
                    Err(AccountError::NoSuchUser(_) | AccountError::NoSuchGroup(_))
                ),
                "{wrong}"
            );
        }
    }

    #[test]
    fn files_that_lead_out_of_the_root_or_are_no_files_are_as_if_they_were_not_there() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("passwd"), "evil:x:0:0::/:\n").unwrap();
        let root = root();
        let passwd = root.path().join("etc/passwd");
        let absolute = outside.path().join("passwd");
        let upwards = format!("../../../../../../../../../..{}", absolute.display());
        for target in [absolute.to_str().unwrap(), &upwards, "/etc/passwd", "passwd", "/proc/self/environ"] {
            fs::remove_file(&passwd).unwrap();
            symlink(target, &passwd).unwrap();
            assert!(resolve(root.path(), "evil", &[]).is_err(), "{target}");
            assert_eq!(resolve(root.path(), "12", &[]).unwrap().uid, 12, "{target}");
        }
        fs::remove_file(&passwd).unwrap();
        rustix::fs::mknodat(CWD, &passwd, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        assert_eq!(resolve(root.path(), "12:34", &[]).unwrap().gid, 34);
    }

    #[test]
    fn a_link_inside_the_root_is_followed() {
        let root = root();
        fs::rename(root.path().join("etc/passwd"), root.path().join("users")).unwrap();
        symlink("/users", root.path().join("etc/passwd")).unwrap();
        assert_eq!(resolve(root.path(), "www", &[]).unwrap().uid, 33);
    }
}
