//! Damage of every kind: found, and repaired by what comes from elsewhere.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};

use common::{Fixture, Tar, fixture};
use kiln_contract::Digest;
use kiln_store::{
    DocumentKind, GcOptions, Image, ImageName, Repair, Store, StoreError, WantedDocument, WantedLayer,
};

/// What a registry would have.
#[derive(Default)]
struct Elsewhere {
    tars: BTreeMap<Digest, Vec<u8>>,
    documents: BTreeMap<Digest, Vec<u8>>,
    asked_documents: RefCell<Vec<WantedDocument>>,
    asked_layers: RefCell<Vec<WantedLayer>>,
}

impl Repair for Elsewhere {
    fn document(&self, wanted: &WantedDocument) -> io::Result<Vec<u8>> {
        self.asked_documents.borrow_mut().push(wanted.clone());
        self.documents.get(&wanted.digest).cloned().ok_or_else(|| io::Error::other("nobody has it"))
    }

    fn layer(&self, wanted: &WantedLayer) -> io::Result<Box<dyn Read + Send>> {
        self.asked_layers.borrow_mut().push(wanted.clone());
        let tar = self.tars.get(&wanted.diff_id).cloned();
        Ok(Box::new(Cursor::new(tar.ok_or_else(|| io::Error::other("nobody has it"))?)))
    }
}

/// A store with one image of two layers, asked for by the digest of an index; and all of it elsewhere.
struct Sample {
    fixture: Fixture,
    image: Image,
    index: Digest,
    /// A file of the upper layer.
    object: Digest,
    elsewhere: Elsewhere,
}

static LARGE: [u8; 70_000] = [2; 70_000];

impl Sample {
    fn new() -> Self {
        let fixture = fixture();
        let mut tars =
            [Tar::new().file("a", &[1; 1000]).end(), Tar::new().file("b", &LARGE).file("c", &[3; 500]).end()];
        // As nobody writes it: what its split stream was cannot be made of the tree.
        tars[1].extend([0; 512]);
        let layers: Vec<_> = tars.iter().map(|tar| fixture.import(tar).unwrap().layer).collect();
        let store = &fixture.store;
        let image = store.make_image(&Default::default(), &layers).unwrap();
        let name = ImageName::parse("registry.test/team/app:1").unwrap();
        store.tag(&name, &image.manifest_digest, "made").unwrap();
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.manifest_digest, "size": 1,
        }]});
        let index = store.put_blob(&serde_json::to_vec(&index).unwrap()).unwrap();
        store.remember_origin(&image.id, "origin.test/app", Some(&index)).unwrap();
        let blob = |digest: Digest| (digest, store.blob(&digest).unwrap().unwrap());
        let elsewhere = Elsewhere {
            tars: tars.into_iter().map(|tar| (Digest::of(&tar), tar)).collect(),
            documents: [image.id, image.manifest_digest, index].map(blob).into(),
            ..Elsewhere::default()
        };
        store.merged_tree(&image.layers).unwrap();
        assert_eq!(store.check(None).unwrap().damaged, [""; 0]);
        Self { image, index, object: Digest::of(&LARGE), elsewhere, fixture }
    }

    fn store(&self) -> &Store {
        &self.fixture.store
    }

    fn path(&self, name: &str) -> PathBuf {
        self.store().path().join(name)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.path(&format!("blobs/sha256/{}", digest.hex()))
    }

    fn tree(&self) -> PathBuf {
        self.store().layer_path(&self.image.layers[1])
    }

    fn split(&self) -> PathBuf {
        self.tree().with_extension("split")
    }

    fn record(&self) -> PathBuf {
        self.path(&format!("diffs/{}", self.image.diff_ids()[1].hex()))
    }

    /// Every file of the store but what says what is damaged.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut stack = vec![self.store().path().to_owned()];
        while let Some(directory) = stack.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => stack.push(path),
                    false if path.ends_with("store/damaged") => {}
                    false => drop(files.insert(path.clone(), std::fs::read(&path).unwrap())),
                }
            }
        }
        files
    }

    /// Imports another tar of the upper layer's tree, before or after the image's own in the order of digests.
    fn add_tar(&mut self, before: bool) {
        let own = self.image.diff_ids()[1];
        let mut other = Tar::new().file("c", &[3; 500]).file("b", &LARGE).end();
        while (Digest::of(&other) < own) != before {
            other.extend([0; 512]);
        }
        assert_eq!(self.fixture.import(&other).unwrap().layer, self.image.layers[1]);
        self.elsewhere.tars.insert(Digest::of(&other), other);
    }

    fn damage_both(&self) {
        damage(self.split(), 20);
        let other = self.elsewhere.tars.keys().find(|tar| !self.image.diff_ids().contains(tar)).unwrap();
        damage(self.path(&format!("diffs/{}.split", other.hex())), 100);
    }

    fn assert_whole(&self, what: &str) {
        assert_eq!(self.store().check(None).unwrap().damaged, [""; 0], "{what}");
        let image = self.store().resolve("registry.test/team/app:1").unwrap();
        assert_eq!((image.id, &image.layers), (self.image.id, &self.image.layers), "{what}");
        for (diff_id, tar) in &self.elsewhere.tars {
            let mut back = Vec::new();
            self.store().export_diff(diff_id, &mut back).unwrap();
            assert!(back == *tar, "{what}");
        }
        self.store().merged_tree(&self.image.layers).unwrap();
    }
}

fn remove(path: impl AsRef<Path>) {
    std::fs::remove_file(path).unwrap();
}

/// Turns a bit, and leaves the length as it is.
fn damage(path: impl AsRef<Path>, at: usize) {
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 1;
    remove(&path);
    std::fs::write(path, bytes).unwrap();
}

type Damage = (&'static str, fn(&Sample));

/// What the store makes again from what else it has.
const FROM_HERE: [&str; 3] = ["a damaged tree", "a missing tree", "a missing record"];

const OBJECTS: [Damage; 3] = [
    ("an object with a wrong byte", |sample| damage(sample.store().object_path(&sample.object), 69_999)),
    ("a torn object", |sample| {
        remove(sample.store().object_path(&sample.object));
        std::fs::write(sample.store().object_path(&sample.object), [2; 4096]).unwrap();
    }),
    ("a missing object", |sample| remove(sample.store().object_path(&sample.object))),
];

const LAYERS: [Damage; 13] = [
    ("a damaged tree", |sample| damage(sample.tree(), std::fs::read(sample.tree()).unwrap().len() - 1)),
    ("a missing tree", |sample| remove(sample.tree())),
    ("a missing tree and its split stream", |sample| {
        remove(sample.tree());
        remove(sample.split());
    }),
    ("a missing tree, its split stream and its record", |sample| {
        remove(sample.tree());
        remove(sample.split());
        remove(sample.record());
    }),
    ("a missing record", |sample| remove(sample.record())),
    ("a missing tree and a damaged object", |sample| {
        remove(sample.tree());
        damage(sample.store().object_path(&sample.object), 0);
    }),
    ("split streams with a wrong byte", |sample| damage(sample.split(), 100)),
    ("a split stream for another tar", |sample| damage(sample.split(), 20)),
    ("a split stream of another kind", |sample| damage(sample.split(), 12)),
    ("a torn split stream", |sample| std::fs::write(sample.split(), "KILN").unwrap()),
    ("a missing split stream", |sample| remove(sample.split())),
    ("both streams of two tars of one tree, of which the image's comes first", Sample::damage_both),
    ("both streams of two tars of one tree, of which the image's comes last", Sample::damage_both),
];

const DOCUMENTS: [Damage; 9] = [
    ("a damaged manifest", |sample| damage(sample.blob(&sample.image.manifest_digest), 9)),
    ("a missing manifest", |sample| remove(sample.blob(&sample.image.manifest_digest))),
    ("a damaged config", |sample| damage(sample.blob(&sample.image.id), 9)),
    ("a missing config", |sample| remove(sample.blob(&sample.image.id))),
    ("a damaged index", |sample| damage(sample.blob(&sample.index), 9)),
    ("a missing index", |sample| remove(sample.blob(&sample.index))),
    ("all documents", |sample| {
        damage(sample.blob(&sample.image.manifest_digest), 9);
        remove(sample.blob(&sample.image.id));
        remove(sample.blob(&sample.index));
    }),
    ("all documents, and the layers that they name", |sample| {
        remove(sample.blob(&sample.image.manifest_digest));
        damage(sample.blob(&sample.image.id), 0);
        remove(sample.tree());
        remove(sample.split());
        remove(sample.record());
    }),
    ("a missing manifest and the image's record", |sample| {
        remove(sample.blob(&sample.image.manifest_digest));
        remove(sample.path(&format!("images/{}", sample.image.id.hex())));
    }),
];

#[test]
fn damage_of_every_kind_is_found_and_repaired() {
    for (what, act) in OBJECTS.iter().chain(&LAYERS).chain(&DOCUMENTS) {
        let mut sample = Sample::new();
        if what.contains("two tars") {
            sample.add_tar(what.ends_with("last"));
        }
        act(&sample);
        let found = sample.store().check(None).unwrap();
        assert!(!found.damaged.is_empty(), "{what} was not found");

        if FROM_HERE.contains(what) {
            let repaired = sample.store().check(Some(&Elsewhere::default())).unwrap();
            assert_eq!(
                (repaired.damaged.len(), repaired.repaired.is_empty()),
                (0, false),
                "{what}: {repaired:?}"
            );
            sample.assert_whole(what);
            continue;
        }
        // Nobody has anything: it is told, and whatever is there stays, however bad.
        let before = sample.files();
        let helpless = sample.store().check(Some(&Elsewhere::default())).unwrap();
        assert!(helpless.damaged.iter().any(|line| line.ends_with("nobody has it")), "{what}: {helpless:?}");
        assert!(helpless.repaired.is_empty(), "{what}: {helpless:?}");
        assert!(sample.files() == before, "{what}: something changed without a replacement");

        let repaired = sample.store().check(Some(&sample.elsewhere)).unwrap();
        assert_eq!(repaired.damaged, [""; 0], "{what}");
        assert!(!repaired.repaired.is_empty(), "{what}");
        sample.assert_whole(what);
    }
}

#[test]
fn what_comes_with_another_digest_or_breaks_off_replaces_nothing() {
    struct Liar;
    impl Repair for Liar {
        fn document(&self, _: &WantedDocument) -> io::Result<Vec<u8>> {
            Ok(b"{}".to_vec())
        }

        fn layer(&self, _: &WantedLayer) -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(Cursor::new(Tar::new().file("evil", &[6; 600]).end())))
        }
    }
    struct Breaking(Elsewhere);
    impl Repair for Breaking {
        fn document(&self, _: &WantedDocument) -> io::Result<Vec<u8>> {
            Err(io::Error::other("the network is gone"))
        }

        fn layer(&self, wanted: &WantedLayer) -> io::Result<Box<dyn Read + Send>> {
            struct Gone;
            impl Read for Gone {
                fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                    Err(io::Error::other("the network is gone"))
                }
            }
            Ok(Box::new(self.0.layer(wanted)?.take(60_000).chain(Gone)))
        }
    }
    let elsewhere_only = |damage: &&Damage| !FROM_HERE.contains(&damage.0);
    for (what, act) in OBJECTS.iter().chain(&LAYERS[..11]).chain(&DOCUMENTS).filter(elsewhere_only) {
        let mut sample = Sample::new();
        act(&sample);
        let before = sample.files();
        let lied = sample.store().check(Some(&Liar)).unwrap();
        assert!(lied.damaged.iter().any(|line| line.contains("has digest")), "{what}: {lied:?}");
        let breaking = Breaking(std::mem::take(&mut sample.elsewhere));
        let broken = sample.store().check(Some(&breaking)).unwrap();
        assert!(broken.damaged.iter().any(|line| line.contains("the network is gone")), "{what}: {broken:?}");
        assert!(sample.files() == before, "{what}: something changed without a replacement");
    }
}

#[test]
fn what_is_lost_is_asked_for_where_it_came_from() {
    let sample = Sample::new();
    damage(sample.blob(&sample.index), 9);
    remove(sample.blob(&sample.image.manifest_digest));
    remove(sample.tree());
    remove(sample.split());
    sample.store().check(Some(&sample.elsewhere)).unwrap();
    let repositories = ["origin.test/app", "registry.test/team/app"].map(str::to_owned).to_vec();
    let mut asked = sample.elsewhere.asked_documents.take();
    asked.sort_by_key(|wanted| wanted.kind);
    let wanted = |digest, kind| WantedDocument { digest, kind, repositories: repositories.clone() };
    assert_eq!(
        asked,
        [
            wanted(sample.image.manifest_digest, DocumentKind::Manifest),
            wanted(sample.index, DocumentKind::Index)
        ]
    );
    let blobs = vec![sample.image.manifest.layers()[1].clone()];
    let diff_id = sample.image.diff_ids()[1];
    assert_eq!(sample.elsewhere.asked_layers.take(), [WantedLayer { diff_id, blobs, repositories }]);
}

#[test]
fn what_nobody_has_is_repaired_when_it_is_imported_again() {
    for (what, act) in OBJECTS.iter().chain(&LAYERS[..11]).filter(|damage| !FROM_HERE.contains(&damage.0)) {
        let sample = Sample::new();
        let diff_id = sample.image.diff_ids()[1];
        assert!(sample.store().has_sound_layer(&diff_id).unwrap());
        act(&sample);
        sample.store().check(Some(&Elsewhere::default())).unwrap();
        assert!(!sample.store().has_sound_layer(&diff_id).unwrap(), "{what}");
        assert!(sample.store().has_sound_layer(&sample.image.diff_ids()[0]).unwrap(), "{what}: the other is");
        sample.fixture.import(&sample.elsewhere.tars[&diff_id]).unwrap();
        assert!(sample.store().has_sound_layer(&diff_id).unwrap(), "{what}");
        sample.assert_whole(what);
        assert!(!sample.path("damaged").exists(), "{what}: all is well again");
    }
}

#[test]
fn layers_of_directories_and_of_mount_points_are_made_again() {
    let sample = Sample::new();
    let root = sample.fixture.dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("file"), [7; 3000]).unwrap();
    let layer = sample.store().import_directory(&root).unwrap().layer;
    let image = sample.store().make_image(&Default::default(), &[layer]).unwrap();
    sample.store().tag(&ImageName::parse("made/here").unwrap(), &image.manifest_digest, "made").unwrap();
    let stack = sample.store().with_mount_points(&[layer]).unwrap();
    let split = sample.store().layer_path(&layer).with_extension("split");
    for act in [remove as fn(PathBuf), |path| damage(path, 20), |path| std::fs::write(path, "KILN").unwrap()]
    {
        act(split.clone());
        remove(sample.store().layer_path(&stack[0]));
        let report = sample.store().check(Some(&Elsewhere::default())).unwrap();
        assert_eq!(report.damaged, [""; 0]);
        let mut tar = Vec::new();
        sample.store().export_tar(&layer, &mut tar).unwrap();
        assert_eq!(Digest::of(&tar), image.diff_ids()[0]);
        assert_eq!(sample.store().check(None).unwrap().damaged, [""; 0]);
    }
}

#[test]
fn a_wrong_merged_tree_and_damage_that_nobody_needs_are_removed() {
    let sample = Sample::new();
    let merged = sample.store().merged_tree(&sample.image.layers).unwrap();
    let right = std::fs::read(&merged).unwrap();
    remove(&merged);
    std::fs::write(&merged, "not a tree").unwrap();
    let object = Digest::of(b"needed by nothing");
    std::fs::create_dir_all(sample.store().object_path(&object).parent().unwrap()).unwrap();
    std::fs::write(sample.store().object_path(&object), "something else").unwrap();
    let blob = Digest::of(b"an index that nobody remembers");
    std::fs::write(sample.blob(&blob), "something else").unwrap();
    assert_eq!(sample.store().check(None).unwrap().damaged.len(), 3);
    let report = sample.store().check(Some(&Elsewhere::default())).unwrap();
    assert_eq!((report.damaged, report.repaired.len()), (Vec::<String>::new(), 3));
    assert!(!sample.store().object_path(&object).exists() && !sample.blob(&blob).exists());
    assert!(std::fs::read(sample.store().merged_tree(&sample.image.layers).unwrap()).unwrap() == right);
    // But as long as a layer cannot say what it needs, an object may be its.
    std::fs::write(sample.store().object_path(&object), "something else").unwrap();
    remove(sample.tree());
    remove(sample.split());
    sample.store().check(Some(&Elsewhere::default())).unwrap();
    assert!(sample.store().object_path(&object).exists());
}

#[test]
fn a_split_stream_that_an_import_left_without_its_tree_is_no_damage() {
    let sample = Sample::new();
    let left = Digest::of(b"a layer whose import was killed");
    std::fs::copy(sample.split(), sample.store().layer_path(&left).with_extension("split")).unwrap();
    assert_eq!(sample.store().check(None).unwrap().damaged, [""; 0]);
}

#[test]
fn an_index_that_an_image_was_asked_for_by_is_not_collected() {
    let Sample { fixture: Fixture { dir: _dir, home, store }, index, .. } = Sample::new();
    let path = store.path().join(format!("blobs/sha256/{}", index.hex()));
    damage(&path, 9);
    drop(store);
    Store::gc(&home, || Ok::<_, StoreError>(Vec::new()), &GcOptions::default()).unwrap();
    assert!(path.exists());
}
