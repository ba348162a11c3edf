//! Views mounted by the real kernel, each test in a mount namespace of its own.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use kiln_contract::{Change, ChangeKind, Digest, Scratch, ViewBackend as _, ViewRequest};
use kiln_erofs::{Attributes, Content, Data, NodeId, Tree, write_metadata};
use kiln_view::Overlay;

/// Runs `test` in a thread with a private mount namespace, with a request for the tree that [`lay_out`] makes.
fn in_namespace(test: fn(&Overlay, &ViewRequest)) {
    kiln_fixtures::with_private_mounts(move |directory| {
        let request = lay_out(directory);
        let view = Overlay::new();
        test(&view, &request);
        view.unmount(&request.target).unwrap();
    });
}

fn lay_out(directory: &Path) -> ViewRequest {
    for name in ["objects", "target", "upper", "work"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    let large = vec![b'l'; 10_000];
    let digest = Digest::of(&large);
    let hex = digest.hex();
    fs::create_dir(directory.join("objects").join(&hex[..2])).unwrap();
    let object = directory.join("objects").join(&hex[..2]).join(&hex[2..]);
    fs::write(&object, &large).unwrap();
    fs::set_permissions(&object, fs::Permissions::from_mode(0o444)).unwrap();

    let attributes = |mode| Attributes { mode, uid: 7, gid: 8, ..Attributes::default() };
    let mut tree = Tree::new(attributes(0o755));
    let etc = tree.add(NodeId::ROOT, b"etc", Content::Directory, attributes(0o755)).unwrap();
    let inline = Content::Regular(Data::Inline(b"small".to_vec()));
    tree.add(etc, b"small", inline.clone(), attributes(0o640)).unwrap();
    tree.add(etc, b"gone", inline, attributes(0o644)).unwrap();
    let data = Data::Object { digest, size: large.len() as u64 };
    tree.add(NodeId::ROOT, b"large", Content::Regular(data), attributes(0o4755)).unwrap();
    tree.add(NodeId::ROOT, b"link", Content::Symlink(b"etc/small".to_vec()), attributes(0o777)).unwrap();
    let mut bytes = Vec::new();
    write_metadata(&tree, &mut bytes).unwrap();
    fs::write(directory.join("tree.erofs"), bytes).unwrap();
    ViewRequest {
        tree: directory.join("tree.erofs"),
        objects: directory.join("objects"),
        target: directory.join("target"),
        scratch: Some(Scratch {
            upper: directory.join("upper"),
            work: directory.join("work"),
            volatile: false,
        }),
    }
}

#[test]
fn a_view_shows_the_tree_with_its_data_and_attributes() {
    in_namespace(|view, request| {
        view.mount(request).unwrap();
        let at = |name: &str| request.target.join(name);
        assert_eq!(fs::read(at("large")).unwrap(), vec![b'l'; 10_000]);
        assert_eq!(fs::read(at("link")).unwrap(), b"small");
        let metadata = fs::metadata(at("large")).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o4755, 7, 8));
        assert!(view.changes(request).unwrap().is_empty());
    });
}

#[test]
fn what_is_edited_goes_to_the_scratch_and_is_told() {
    in_namespace(|view, request| {
        view.mount(request).unwrap();
        let at = |name: &str| request.target.join(name);
        fs::remove_file(at("etc/gone")).unwrap();
        fs::write(at("etc/new"), "n").unwrap();
        fs::set_permissions(at("large"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("x", at("etc/soft")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        let told: Vec<(String, ChangeKind)> = view
            .changes(request)
            .unwrap()
            .into_iter()
            .map(|Change { path, kind }| (String::from_utf8(path).unwrap(), kind))
            .collect();
        use ChangeKind::{Added, Deleted, Modified};
        let wanted = [
            ("/dir", Added),
            ("/etc", Modified),
            ("/etc/gone", Deleted),
            ("/etc/new", Added),
            ("/etc/soft", Added),
            ("/large", Modified),
        ];
        assert_eq!(told, wanted.map(|(path, kind)| (path.to_owned(), kind)));
        view.unmount(&request.target).unwrap();
        view.mount(request).unwrap();
        assert_eq!(fs::read(at("etc/new")).unwrap(), b"n");
        assert!(!at("etc/gone").exists());
    });
}

#[test]
fn a_directory_that_was_replaced_hides_what_it_had() {
    in_namespace(|view, request| {
        view.mount(request).unwrap();
        fs::remove_dir_all(request.target.join("etc")).unwrap();
        fs::create_dir(request.target.join("etc")).unwrap();
        fs::write(request.target.join("etc/small"), "other").unwrap();
        let told = view.changes(request).unwrap();
        let kind = |path: &str| told.iter().find(|c| c.path == path.as_bytes()).map(|c| c.kind);
        assert_eq!(kind("/etc"), Some(ChangeKind::Modified));
        assert_eq!(kind("/etc/small"), Some(ChangeKind::Modified));
        assert_eq!(kind("/etc/gone"), Some(ChangeKind::Deleted));
    });
}

#[test]
fn without_a_scratch_nothing_can_be_changed() {
    in_namespace(|view, request| {
        let request = ViewRequest { scratch: None, ..request.clone() };
        view.mount(&request).unwrap();
        let error = fs::write(request.target.join("etc/new"), "n").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    });
}

#[test]
fn a_volatile_scratch_mounts_again_after_its_owner_was_killed() {
    in_namespace(|view, request| {
        let mut request = request.clone();
        request.scratch.as_mut().unwrap().volatile = true;
        view.mount(&request).unwrap();
        // Its mark is what a killed owner leaves; an unmount takes it away, so it is made again here.
        view.unmount(&request.target).unwrap();
        fs::create_dir_all(request.scratch.as_ref().unwrap().work.join("work/incompat/volatile")).unwrap();
        view.mount(&request).unwrap();
    });
}

#[test]
fn a_file_that_is_no_tree_is_refused_and_leaves_no_mount() {
    in_namespace(|view, request| {
        fs::write(&request.tree, vec![0; 8192]).unwrap();
        let error = view.mount(request).unwrap_err();
        assert!(error.to_string().contains("tree.erofs"), "{error}");
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        assert!(!mounts.contains(request.target.to_str().unwrap()), "{mounts}");
    });
}
