use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use super::base::split;
use super::*;

fn what(path: &str) -> Pack<'_> {
    Pack { path: Path::new(path), top: Top::Own, follow: false, owners: true }
}

fn unpack(base: &Base, into: &str, archive: &[u8], options: &Unpack<'_>) -> Result<(), ArchiveError> {
    Archive::open(&mut &archive[..])?.unpack(base, Path::new(into), options)
}

fn archive_of(build: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    build(&mut builder);
    builder.into_inner().unwrap()
}

fn entry(builder: &mut tar::Builder<Vec<u8>>, name: &[u8], kind: tar::EntryType, link: &str, data: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_uid(rustix::process::geteuid().as_raw().into());
    header.set_gid(rustix::process::getegid().as_raw().into());
    if !link.is_empty() {
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    }
    header.set_cksum();
    builder.append(&header, data).unwrap();
}

#[test]
fn no_entry_leaves_the_directory() {
    use tar::EntryType::{Link, Regular, Symlink};
    let table: [(&str, Vec<u8>); 6] = [
        ("dot dot", archive_of(|b| entry(b, b"../outside", Regular, "", b"x"))),
        ("dot dot inside", archive_of(|b| entry(b, b"a/../../outside", Regular, "", b"x"))),
        (
            "through a link",
            archive_of(|b| {
                entry(b, b"l", Symlink, "..", b"");
                entry(b, b"l/outside", Regular, "", b"x");
            }),
        ),
        (
            "through an absolute link",
            archive_of(|b| {
                entry(b, b"l", Symlink, "/", b"");
                entry(b, b"l/kiln-outside", Regular, "", b"x");
            }),
        ),
        ("hard link out", archive_of(|b| entry(b, b"h", Link, "../secret", b""))),
        (
            "hard link out through a link",
            archive_of(|b| {
                entry(b, b"l", Symlink, "..", b"");
                entry(b, b"h", Link, "l/secret", b"");
            }),
        ),
    ];
    for (what, archive) in table {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("in")).unwrap();
        fs::write(directory.path().join("secret"), "s").unwrap();
        let base = Base::open(&directory.path().join("in"), Confine::Beneath).unwrap();
        let result = unpack(&base, "", &archive, &Unpack::default());
        assert!(result.is_err(), "{what}");
        assert!(!directory.path().join("outside").exists(), "{what}");
        assert!(!Path::new("/kiln-outside").exists(), "{what}");
        assert_eq!(fs::metadata(directory.path().join("secret")).unwrap().nlink(), 1, "{what}");
    }
}

#[test]
fn an_absolute_name_is_taken_as_one_below_the_directory() {
    let archive = archive_of(|b| entry(b, b"/etc/f", tar::EntryType::Regular, "", b"x"));
    let directory = tempfile::tempdir().unwrap();
    let base = Base::open(directory.path(), Confine::Beneath).unwrap();
    unpack(&base, "", &archive, &Unpack::default()).unwrap();
    assert_eq!(fs::read(directory.path().join("etc/f")).unwrap(), b"x");
}

#[test]
fn links_of_a_root_are_followed_inside_it() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(directory.path().join("usr/lib")).unwrap();
    symlink("/usr/lib", directory.path().join("lib")).unwrap();
    let archive = archive_of(|b| entry(b, b"f", tar::EntryType::Regular, "", b"x"));
    let base = Base::open(directory.path(), Confine::InRoot).unwrap();
    unpack(&base, "/lib", &archive, &Unpack::default()).unwrap();
    assert_eq!(fs::read(directory.path().join("usr/lib/f")).unwrap(), b"x");
}

#[test]
fn a_directory_is_not_replaced_by_a_file_nor_a_file_by_a_directory() {
    use tar::EntryType::{Directory, Regular};
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("d")).unwrap();
    fs::write(directory.path().join("f"), "old").unwrap();
    let base = Base::open(directory.path(), Confine::Beneath).unwrap();
    for archive in [
        archive_of(|b| entry(b, b"d", Regular, "", b"x")),
        archive_of(|b| entry(b, b"f", Directory, "", b"")),
    ] {
        assert!(unpack(&base, "", &archive, &Unpack::default()).is_err());
    }
    assert!(directory.path().join("d").is_dir());
    assert_eq!(fs::read(directory.path().join("f")).unwrap(), b"old");
}

#[test]
fn what_is_packed_unpacks_the_same() {
    let from = tempfile::tempdir().unwrap();
    let long = "n".repeat(200);
    let odd = std::ffi::OsStr::from_bytes(b"odd-\xff\n");
    let top = from.path().join("top");
    fs::create_dir(&top).unwrap();
    fs::write(top.join("file"), vec![7; 100_000]).unwrap();
    fs::set_permissions(top.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::write(top.join(&long), "long").unwrap();
    fs::write(top.join(odd), "odd").unwrap();
    fs::hard_link(top.join("file"), top.join("hard")).unwrap();
    symlink("../elsewhere", top.join("soft")).unwrap();
    xattr::set(top.join("file"), "user.note", b"\0\xffn\n").unwrap();
    fs::create_dir(top.join("sub")).unwrap();
    fs::set_permissions(top.join("sub"), fs::Permissions::from_mode(0o1500)).unwrap();

    let mut archive = Vec::new();
    let base = Base::open(from.path(), Confine::InRoot).unwrap();
    pack(&base, &what("/top"), &mut archive).unwrap();

    let to = tempfile::tempdir().unwrap();
    let base = Base::open(to.path(), Confine::Beneath).unwrap();
    unpack(&base, "", &archive, &Unpack { owners: true, devices: Devices::Made, top: None }).unwrap();
    let top_after = to.path().join("top");
    for name in ["file".as_ref(), long.as_ref(), odd, "hard".as_ref(), "soft".as_ref(), "sub".as_ref()] {
        let (before, after) = (
            fs::symlink_metadata(top.join(name)).unwrap(),
            fs::symlink_metadata(top_after.join(name)).unwrap(),
        );
        let facts = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.mtime(), m.nlink());
        assert_eq!(facts(&before), facts(&after), "{}", name.display());
    }
    assert_eq!(fs::read(top_after.join("hard")).unwrap(), vec![7; 100_000]);
    assert_eq!(fs::read_link(top_after.join("soft")).unwrap(), Path::new("../elsewhere"));
    assert_eq!(xattr::get(top_after.join("file"), "user.note").unwrap().unwrap(), b"\0\xffn\n");
    fs::set_permissions(top.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(top_after.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_link_is_packed_as_itself_or_as_what_it_points_to() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("file"), "data").unwrap();
    symlink("/file", from.path().join("link")).unwrap();
    let base = Base::open(from.path(), Confine::InRoot).unwrap();
    for (follow, kind) in [(false, tar::EntryType::Symlink), (true, tar::EntryType::Regular)] {
        let mut archive = Vec::new();
        pack(&base, &Pack { follow, ..what("link") }, &mut archive).unwrap();
        let mut reader = tar::Archive::new(&archive[..]);
        let mut first = reader.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(first.header().entry_type(), kind);
        assert_eq!(first.path().unwrap(), Path::new("link"));
        let mut data = String::new();
        first.read_to_string(&mut data).unwrap();
        assert_eq!(data, if follow { "data" } else { "" });
    }
}

#[test]
fn paths_split_into_directory_and_name() {
    let table = [
        ("/a/b", Some(("a", "b"))),
        ("b", Some(("", "b"))),
        ("/a//./b/.", Some(("a", "b"))),
        ("../b", Some(("..", "b"))),
        ("/", None),
        ("a/..", None),
    ];
    for (path, parts) in table {
        assert_eq!(split(Path::new(path)), parts.map(|(d, n)| (d.into(), n.into())), "{path}");
    }
}

fn items(items: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
    archive_of(|builder| {
        for (name, kind, text) in items {
            let link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
            let (link, data) = if link { (*text, "") } else { ("", *text) };
            entry(builder, name.as_bytes(), *kind, link, data.as_bytes());
        }
    })
}

#[test]
fn the_topmost_entry_gets_another_name_or_none() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let named = items(&[
        ("d", Directory, ""),
        ("d/f", Regular, "hello"),
        ("d/l", Symlink, "f"),
        ("d/h", Link, "d/f"),
        ("d/deep/g", Regular, "x"),
    ]);
    let root = items(&[
        (".", Directory, ""),
        ("./f", Regular, "hello"),
        ("./h", Link, "./f"),
        ("./deep/g", Regular, "x"),
    ]);
    for (archive, name) in [(&named, "d"), (&root, "")] {
        let mut reader = &archive[..];
        assert_eq!(Archive::open(&mut reader).unwrap().top(), Some((true, name.as_ref())));
        for (top, expected) in [(Top::Named(Path::new("new")), "new"), (Top::Left, ""), (Top::Own, name)] {
            let directory = tempfile::tempdir().unwrap();
            let base = Base::open(directory.path(), Confine::Beneath).unwrap();
            unpack(&base, "", archive, &Unpack { top: Some(top), ..Unpack::default() }).unwrap();
            let at = |name: &str| directory.path().join(expected).join(name);
            assert_eq!(fs::read_to_string(at("f")).unwrap(), "hello", "{top:?}");
            assert_eq!(fs::metadata(at("h")).unwrap().nlink(), 2, "{top:?}");
            assert_eq!(fs::read_to_string(at("deep/g")).unwrap(), "x", "{top:?}");
        }
    }
    // A file alone, too.
    let directory = tempfile::tempdir().unwrap();
    let base = Base::open(directory.path(), Confine::Beneath).unwrap();
    let top = Some(Top::Named(Path::new("g")));
    unpack(&base, "", &items(&[("f", Regular, "1")]), &Unpack { top, ..Unpack::default() }).unwrap();
    assert_eq!(fs::read_to_string(directory.path().join("g")).unwrap(), "1");
    let nothing: &[u8] = &[0; 1024];
    assert_eq!(Archive::open(&mut &*nothing).unwrap().top(), None);
}

#[test]
fn what_is_not_kept_belongs_to_the_caller_and_to_nobody_elses_rights() {
    let from = tempfile::tempdir().unwrap();
    let top = from.path().join("top");
    fs::create_dir(&top).unwrap();
    fs::write(top.join("f"), "x").unwrap();
    for (path, mode) in [(top.join("f"), 0o6755), (top.clone(), 0o2755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let base = Base::open(from.path(), Confine::InRoot).unwrap();
    let mut archive = Vec::new();
    let named = Top::Named(Path::new("new"));
    pack(&base, &Pack { top: named, owners: false, ..what("top") }, &mut archive).unwrap();
    let mut reader = tar::Archive::new(&archive[..]);
    for entry in reader.entries().unwrap() {
        let entry = entry.unwrap();
        assert_eq!((entry.header().uid().unwrap(), entry.header().gid().unwrap()), (0, 0));
        assert!(entry.path().unwrap().starts_with("new"));
    }
    let to = tempfile::tempdir().unwrap();
    let base = Base::open(to.path(), Confine::Beneath).unwrap();
    unpack(&base, "", &archive, &Unpack::default()).unwrap();
    let me = rustix::process::geteuid().as_raw();
    for name in ["new", "new/f"] {
        let metadata = fs::metadata(to.path().join(name)).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (0o755, me), "{name}");
    }

    let mut entries = Vec::new();
    pack(
        &Base::open(from.path(), Confine::InRoot).unwrap(),
        &Pack { top: Top::Left, ..what("top") },
        &mut entries,
    )
    .unwrap();
    let mut reader = tar::Archive::new(&entries[..]);
    let names: Vec<_> =
        reader.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect();
    assert_eq!(names, [Path::new("f")]);
}

#[test]
fn a_link_at_a_files_own_name_is_replaced_and_one_to_a_directory_is_filled() {
    use tar::EntryType::{Directory, Regular};
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let base = Base::open(directory.path(), Confine::Beneath).unwrap();
    symlink(&victim, directory.path().join("f")).unwrap();
    unpack(&base, "", &items(&[("f", Regular, "new")]), &Unpack::default()).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    assert_eq!(fs::read_to_string(directory.path().join("f")).unwrap(), "new");

    fs::create_dir(directory.path().join("real")).unwrap();
    symlink("real", directory.path().join("inside")).unwrap();
    symlink(outside.path(), directory.path().join("out")).unwrap();
    let into = |name: &str| {
        let file = format!("{name}/g");
        unpack(&base, "", &items(&[(name, Directory, ""), (&file, Regular, "x")]), &Unpack::default())
    };
    into("inside").unwrap();
    assert_eq!(fs::read_to_string(directory.path().join("real/g")).unwrap(), "x");
    assert!(into("out").is_err() && !outside.path().join("g").exists());
}

#[test]
fn devices_are_refused_or_left_out_and_truncated_archives_are_errors() {
    use std::cell::RefCell;
    use tar::EntryType::{Char, Regular};
    let directory = tempfile::tempdir().unwrap();
    let base = Base::open(directory.path(), Confine::Beneath).unwrap();
    let archive = items(&[("null", Char, ""), ("f", Regular, "1")]);
    assert!(unpack(&base, "", &archive, &Unpack::default()).is_err());
    let left = RefCell::new(Vec::new());
    let tell = |path: &Path| left.borrow_mut().push(path.to_owned());
    let options = Unpack { devices: Devices::LeftOut(&tell), ..Unpack::default() };
    unpack(&base, "", &archive, &options).unwrap();
    assert_eq!(*left.borrow(), [Path::new("null")]);
    assert!(directory.path().join("f").exists() && !directory.path().join("null").exists());

    let long = items(&[("long", Regular, &"x".repeat(5000))]);
    assert!(unpack(&base, "", &long[..2000], &Unpack::default()).is_err());
}
