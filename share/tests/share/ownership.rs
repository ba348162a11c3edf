//! Whom files belong to: as root, as an ordinary user, and with all users made one.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::Path;

use kiln_fixtures::{OrdinaryUser, require_root};
use kiln_share::{Options, Ownership, Share};
use nix::libc::{EOPNOTSUPP, EPERM};

use crate::client::*;

const DIRECTORY: &str = "KILN_TEST_SHARED_DIRECTORY";

/// Runs the calling test again, as an ordinary user: `test` gets a directory of his, in which `prepare` has made files.
pub(crate) fn as_user(name: &str, prepare: impl FnOnce(&Path), test: impl FnOnce(&Path)) {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return test(Path::new(&directory));
    }
    let Some(user) = OrdinaryUser::get() else { return };
    let directory = user.tempdir();
    prepare(directory.path());
    let owner = directory.path().metadata().unwrap();
    for entry in fs::read_dir(directory.path()).unwrap() {
        chown(entry.unwrap().path(), Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    let mut command = user.command(&std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(DIRECTORY, directory.path());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Makes one of each with the group 2000, and says whom they belong to on the host.
fn make_one_of_each(client: &mut Client, host: &Path) -> Vec<(u32, u32, u32)> {
    client.walk(ROOT, 1, &[""; 0]).unwrap();
    let b = Body::new;
    client.call(LCREATE, &b().u32(1).string("file").u32(O_RDWR).u32(0o4755).u32(2000)).unwrap();
    client.call(MKDIR, &b().u32(ROOT).string("directory").u32(0o2755).u32(2000)).unwrap();
    client.call(SYMLINK, &b().u32(ROOT).string("link").string("/nowhere").u32(2000)).unwrap();
    client.call(MKNOD, &b().u32(ROOT).string("pipe").u32(0o010_640).u32(0).u32(0).u32(2000)).unwrap();
    client.call(MKNOD, &b().u32(ROOT).string("node").u32(0o100_640).u32(0).u32(0).u32(2000)).unwrap();
    let names = ["file", "directory", "link", "pipe", "node"];
    let found = names.map(|name| host.join(name).symlink_metadata().unwrap());
    found.iter().map(|found| (found.uid(), found.gid(), found.mode() & 0o7777)).collect()
}

#[test]
fn what_root_serves_belongs_to_the_guests_user_who_made_it() {
    if !require_root() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let share = Share::directory(host.path(), Options::default()).unwrap();
    let mut client = Client::attached_as(&share, 1234);
    assert_eq!(
        make_one_of_each(&mut client, host.path()),
        [
            (1234, 2000, 0o4755),
            (1234, 2000, 0o2755),
            (1234, 2000, 0o777),
            (1234, 2000, 0o640),
            (1234, 2000, 0o640)
        ]
    );
    let found = client.stat("file").unwrap();
    assert_eq!((found.uid, found.gid, found.mode), (1234, 2000, 0o104_755));
    let link = client.fid("link").unwrap();
    client.setattr(link, Change::owner(7, 8)).unwrap();
    let found = host.path().join("link").symlink_metadata().unwrap();
    assert_eq!((found.uid(), found.gid()), (7, 8));
    let file = client.fid("file").unwrap();
    client.setattr(file, Change { valid: 4, gid: 9, ..Change::default() }).unwrap();
    let found = host.path().join("file").metadata().unwrap();
    assert_eq!(
        (found.uid(), found.gid(), found.mode() & 0o7777),
        (1234, 9, 0o755),
        "chown takes set-user-ID away"
    );
    // Capabilities of files and ACLs are the host's own.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    client.set_xattr("file", "security.capability", &capability, 0).unwrap();
    assert_eq!(client.xattr("file", "security.capability").unwrap(), capability);
    assert!(client.xattr("file", "").unwrap().windows(19).any(|part| part == b"security.capability"));
    client.close().unwrap();

    // Who does not say who he is makes files for this process's user.
    let mut nobody = Client::attached_as(&share, NONE);
    nobody.create("", "nobody's", O_RDWR, 0o600).unwrap();
    let found = host.path().join("nobody's").metadata().unwrap();
    assert_eq!((found.uid(), found.gid()), (0, 0));
}

#[test]
fn what_an_ordinary_user_serves_belongs_to_him() {
    as_user("ownership::what_an_ordinary_user_serves_belongs_to_him", |_| {}, served_by_an_ordinary_user);
}

fn served_by_an_ordinary_user(host: &Path) {
    let owner = host.metadata().unwrap();
    let (uid, gid) = (owner.uid(), owner.gid());
    assert_ne!(uid, 0);
    let share = Share::directory(host, Options::default()).unwrap();
    let mut client = Client::attached_as(&share, 0);
    let modes = [0o4755, 0o2755, 0o777, 0o640, 0o640];
    assert_eq!(make_one_of_each(&mut client, host), modes.map(|mode| (uid, gid, mode)));
    let file = client.fid("file").unwrap();
    assert_eq!(client.setattr(file, Change::owner(0, 0)), Err(EPERM));
    assert_eq!(client.setattr(file, Change::owner(uid, gid)), Ok(()));
    // Everything else works as it does for root.
    client.setattr(file, Change::size(5)).unwrap();
    client.setattr(file, Change { valid: 32 | 256, mtime: (5, 0), ..Change::default() }).unwrap();
    client.set_xattr("file", "user.x", b"x", 0).unwrap();
    assert_eq!(client.xattr("file", "user.x").unwrap(), b"x");
    client.call(LINK, &Body::new().u32(ROOT).u32(file).string("hard")).unwrap();
    let link = client.fid("link").unwrap();
    client.call(LINK, &Body::new().u32(ROOT).u32(link).string("hard-link")).unwrap();
    let open = client.open("file", O_RDWR).unwrap();
    assert_eq!(client.lock(open, 1, 0, 0, 0), Ok(0));
    client.call(UNLINKAT, &Body::new().u32(ROOT).string("hard").u32(0)).unwrap();
    let read_only = Options { read_only: true, ..Options::default() };
    let mut client = Client::new(&Share::directory("/etc", read_only).unwrap());
    let passwd = client.open("passwd", O_RDONLY).unwrap();
    assert!(
        !client.read(passwd, 0, 100).unwrap().is_empty(),
        "a file of root's, whose access time stays root's"
    );
}

#[test]
fn all_users_can_be_one() {
    as_user("ownership::all_users_can_be_one", |_| {}, served_with_all_users_one);
}

fn served_with_all_users_one(host: &Path) {
    let owner = host.metadata().unwrap();
    let options = Options { ownership: Ownership::Squash { uid: 0, gid: 100 }, ..Options::default() };
    let mut client = Client::attached_as(&Share::directory(host, options).unwrap(), 1000);
    // Programs must not become the host's user; a directory's group is inherited, which is harmless.
    let modes = [0o755, 0o2755, 0o777, 0o640, 0o640];
    let expected = modes.map(|mode| (owner.uid(), owner.gid(), mode));
    assert_eq!(make_one_of_each(&mut client, host), expected);
    for name in ["", "file", "directory", "link"] {
        let found = client.stat(name).unwrap();
        assert_eq!((found.uid, found.gid), (0, 100), "{name}");
    }
    let file = client.fid("file").unwrap();
    client.setattr(file, Change::owner(33, 33)).unwrap();
    client.setattr(file, Change::mode(0o6711)).unwrap();
    let found = host.join("file").metadata().unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (owner.uid(), owner.gid(), 0o711));
    client.set_xattr("file", "user.x", b"x", 0).unwrap();
    for name in ["security.capability", "system.posix_acl_access"] {
        assert_eq!(client.set_xattr("file", name, b"x", 0), Err(EOPNOTSUPP), "{name}");
    }
}
