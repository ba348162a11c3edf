//! Layers of zstd:chunked: packed, read as plain zstd, and pulled lazily; and tables of contents that lie.

mod support;

use std::io::Read as _;
use std::sync::Barrier;

use kiln_contract::{Digest, Home, Silent};
use kiln_fixtures::{RegistryOptions, RegistryServer};
use kiln_registry::{Packing, PullOptions, PullPolicy, Pulled, PushOptions, Registry, RegistryError};
use kiln_store::{GcOptions, ImageName, ImportLimits, Store, StoreError, TOC_DIGEST, TOC_POSITION};
use serde_json::{Value, json};
use support::{HandMade, Reply, Server, TestStore, name, noise, plain_registry, tar, tar_header};

fn lazily() -> PullOptions {
    PullOptions { policy: PullPolicy::Always, lazy: true, ..PullOptions::default() }
}

fn pull(
    store: &TestStore,
    registry: &Registry,
    from: &ImageName,
    lazy: bool,
) -> Result<Pulled, RegistryError> {
    registry.pull(&store.store, from, &PullOptions { lazy, ..lazily() }, &Silent)
}

/// An entry of a tar: header, data, padding.
fn entry(name: &[u8], kind: u8, link: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = tar_header("", data.len() as u64);
    header[..name.len()].copy_from_slice(name);
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link);
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut all = [&header, data].concat();
    all.resize(all.len().next_multiple_of(512), 0);
    all
}

fn closed(entries: &[Vec<u8>]) -> Vec<u8> {
    [entries.concat(), vec![0; 1024]].concat()
}

fn pax(records: &[(&str, &[u8])], of: Vec<u8>) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length =
            (1..4).map(|digits| rest + digits).find(|all| all.to_string().len() + rest == *all).unwrap();
        data.extend_from_slice(format!("{length} {key}=").as_bytes());
        data.extend_from_slice(value);
        data.push(b'\n');
    }
    [entry(b"pax", b'x', b"", &data), of].concat()
}

/// Tars, and whether a table of contents can tell all that is in them.
fn tars() -> Vec<(&'static str, Vec<u8>, bool)> {
    let large = noise(3 << 20);
    let file = |name: &[u8], data: &[u8]| entry(name, b'0', b"", data);
    let sparse = {
        let map: &[(&str, &[u8])] = &[
            ("GNU.sparse.major", b"0"),
            ("GNU.sparse.minor", b"1"),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.size", b"100000"),
            ("GNU.sparse.numblocks", b"1"),
            ("GNU.sparse.map", b"50000,600"),
        ];
        pax(map, file(b"x", &[7; 600]))
    };
    vec![
        ("nothing", closed(&[]), true),
        (
            "files of many sizes",
            closed(
                &[0, 1, 63, 64, 65, 511, 512, 513, 100_000]
                    .map(|size: usize| file(format!("f{size}").as_bytes(), &large[size..2 * size])),
            ),
            true,
        ),
        ("a file of several windows", closed(&[file(b"large", &large), file(b"after", &[1; 200])]), true),
        (
            "directories, links and pipes",
            closed(&[
                entry(b"./", b'5', b"", b""),
                entry(b"./d/", b'5', b"", b""),
                file(b"./d/a", &[3; 300]),
                entry(b"./d/hard", b'1', b"./d/a", b""),
                entry(b"./link", b'2', b"../../etc/passwd", b""),
                entry(b"./pipe", b'6', b"", b""),
                entry(b"./d/null", b'3', b"", b""),
            ]),
            true,
        ),
        (
            "removed names",
            closed(&[entry(b"d/", b'5', b"", b""), file(b"d/.wh..wh..opq", b""), file(b".wh.gone", b"")]),
            true,
        ),
        (
            "attributes and fractions of seconds",
            closed(&[pax(
                &[("mtime", b"1700000000.123456789"), ("SCHILY.xattr.user.a", b"\x00\xffb=c\n")],
                file(b"a", &[9; 100]),
            )]),
            true,
        ),
        ("before 1970", closed(&[pax(&[("mtime", b"-1.5")], file(b"a", &[9; 100]))]), true),
        ("directories that are only implied", closed(&[file(b"a/b/c/d", &[5; 80])]), true),
        ("never closed", [tar_header("a", 100).to_vec(), vec![8; 100]].concat(), true),
        ("padding after the end", [tar(&[("a", &[1; 90])]), vec![0; 9000]].concat(), true),
        ("a name that is no UTF-8", closed(&[file(b"\xff\xfe", &[1; 100])]), false),
        ("a link to what is no UTF-8", closed(&[entry(b"l", b'2', b"\xff", b"")]), false),
        ("a name twice", closed(&[file(b"a", &[1; 100]), file(b"./a", &[2; 100])]), false),
        ("a sparse file", closed(&[sparse]), false),
    ]
}

fn unzstd(bytes: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    zstd::Decoder::new(bytes).unwrap().read_to_end(&mut all).unwrap();
    all
}

fn objects(store: &Store) -> usize {
    let directories = std::fs::read_dir(store.path().join("objects")).unwrap();
    directories.map(|directory| std::fs::read_dir(directory.unwrap().path()).unwrap().count()).sum()
}

#[test]
fn layers_are_plain_zstd_and_give_the_same_trees_lazily_and_whole() {
    let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let (registry, _conf) = plain_registry();
    for (at, (what, tar, can_be_told)) in tars().into_iter().enumerate() {
        let here = TestStore::new();
        let layer = here.store.import_tar(&tar[..], None, ImportLimits::default()).unwrap();
        let image = here.store.make_image(&Default::default(), &[layer.layer]).unwrap();
        let to = name(&format!("{}/odd/t{at}:1", server.address()));
        let options = PushOptions { packing: Packing::Chunked, ..PushOptions::default() };
        let pushed = registry.push(&here.store, &image, &to, &options, &Silent).unwrap();
        assert_eq!(pushed.layers_pushed, 1, "{what}");
        let again = registry.push(&here.store, &image, &to, &options, &Silent).unwrap();
        assert_eq!(again.manifest, pushed.manifest, "{what}: the table is remembered");
        assert_eq!(again.layers_present, usize::from(can_be_told), "{what}");

        let lazy = TestStore::new();
        let pulled = pull(&lazy, &registry, &to, true).unwrap();
        let descriptor = pulled.image.manifest.layers()[0].clone();
        let annotated = descriptor.annotations().as_ref().is_some_and(|all| all.contains_key(TOC_DIGEST));
        assert_eq!(annotated, can_be_told, "{what}");
        assert_eq!(
            (pulled.layers_lazy, pulled.image.whole),
            (usize::from(can_be_told), !can_be_told),
            "{what}"
        );
        assert_eq!(pulled.image.layers, [layer.layer], "{what}: another tree");

        let hex = descriptor.digest().digest();
        let path = format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]);
        let blob = std::fs::read(server.directory.path().join(path)).unwrap();
        assert!(unzstd(&blob) == tar, "{what}: another tar");

        // Each object comes alone, and all of them are the ones that the tar has.
        let contents = lazy.store.layer_contents(&layer.layer).unwrap();
        assert_eq!(contents.absent_objects > 0, can_be_told && contents.objects > 0, "{what}");
        if can_be_told {
            assert_eq!(objects(&lazy.store), 0, "{what}");
            for digest in all_objects(&here.store) {
                lazy.store.fetch_object(&digest, &registry.repair(&lazy.store, &Silent)).unwrap();
            }
            assert_eq!(lazy.store.layer_contents(&layer.layer).unwrap().absent_objects, 0, "{what}");
            let report = lazy.store.check(None).unwrap();
            assert_eq!((report.damaged.len(), report.absent.len()), (0, 1), "{what}: {report:?}");
        }
        let whole = registry.complete(&lazy.store, &pulled.image, ImportLimits::default(), &Silent).unwrap();
        assert!(whole.whole && whole.layers == [layer.layer], "{what}");
        let mut back = Vec::new();
        lazy.store.export_tar(&layer.layer, &mut back).unwrap();
        assert!(back == tar, "{what}");
        let report = lazy.store.check(None).unwrap();
        assert_eq!((report.damaged.len(), report.absent.len()), (0, 0), "{what}: {report:?}");
    }
}

fn all_objects(store: &Store) -> Vec<Digest> {
    let mut all = Vec::new();
    for directory in std::fs::read_dir(store.path().join("objects")).unwrap() {
        let directory = directory.unwrap();
        for file in std::fs::read_dir(directory.path()).unwrap() {
            let names = (directory.file_name(), file.unwrap().file_name());
            all.push(Digest::from_hex(&format!("{}{}", names.0.display(), names.1.display())).unwrap());
        }
    }
    all
}

/// A layer of two files, made by hand, whose table can be made to say anything.
struct Made {
    blob: Vec<u8>,
    entries: Vec<Value>,
    tar: Vec<u8>,
    /// The digests of the files, both of which become objects.
    files: [Digest; 2],
}

/// `frames` may change the bytes of the first file before they are compressed, and the second's frames.
fn made(first: &[u8], change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Made {
    let contents = [vec![1; 3000], noise(5000)];
    let tar = tar(&[("a", &contents[0]), ("b", &contents[1])]);
    let pack = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    let mut blob = pack(&tar[..512]);
    let mut entries = Vec::new();
    let data = [pack(first), change(pack(&contents[1]))];
    for (at, (frames, content)) in data.iter().zip(&contents).enumerate() {
        let offset = blob.len();
        blob.extend_from_slice(frames);
        entries.push(json!({
            "type": "reg", "name": (["a", "b"][at]), "mode": 0o644, "size": content.len(), "modtime": "1970-01-01T00:00:00Z",
            "digest": Digest::of(content), "offset": offset, "endOffset": blob.len(),
        }));
        // Padding and the next header; then padding and the end.
        blob.extend(pack([&tar[3512..4096], &tar[9096..]][at]));
    }
    let files = contents.map(|content| Digest::of(&content));
    Made { blob, entries, tar, files }
}

impl Made {
    /// As a registry serves it; `say` may change what the annotations tell.
    fn image(&self, toc: &[u8], say: impl FnOnce(&mut Value)) -> HandMade {
        let packed = zstd::encode_all(toc, 3).unwrap();
        let mut blob = self.blob.clone();
        blob.extend([0x50, 0x2a, 0x4d, 0x18]);
        blob.extend((packed.len() as u32).to_le_bytes());
        let position = format!("{}:{}:{}:1", blob.len(), packed.len(), toc.len());
        blob.extend(&packed);
        let mut annotations = json!({ TOC_DIGEST: Digest::of(&packed), TOC_POSITION: position });
        say(&mut annotations);
        let mut image = HandMade::of_packed(&[(blob.clone(), Digest::of(&self.tar))]);
        let config = json!({
            "os": "linux", "architecture": kiln_contract::Platform::host().architecture,
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&self.tar)]},
        });
        image.set(
            &config,
            &[json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "digest": Digest::of(&blob),
                "size": blob.len(), "annotations": annotations,
            })],
        );
        image
    }

    fn toc(&self) -> Vec<u8> {
        json!({"version": 1, "entries": self.entries}).to_string().into_bytes()
    }
}

fn is_untouched(store: &Store) -> bool {
    let empty =
        |name: &str| std::fs::read_dir(store.path().join(name)).map_or(true, |mut all| all.next().is_none());
    ["objects", "layers", "lazy", "tmp", "images"].into_iter().all(empty) && store.tags().unwrap().is_empty()
}

fn serve(image: HandMade) -> Server {
    Server::start(move |request, _| image.answer(request))
}

type Change = fn(&mut Vec<Value>);

#[test]
fn tables_that_make_no_sense_are_refused_and_nothing_is_kept() {
    let (registry, _conf) = plain_registry();
    let good = made(&[1; 3000], |frames| frames);
    let changes: Vec<(&str, Change)> = vec![
        ("beyond the blob", |all| all[1]["endOffset"] = json!(1_u64 << 40)),
        ("beyond all numbers", |all| all[1]["endOffset"] = json!(u64::MAX)),
        ("into the table", |all| all[1]["endOffset"] = json!(all[1]["endOffset"].as_u64().unwrap() + 100)),
        ("an end before its beginning", |all| all[1]["endOffset"] = json!(1)),
        ("an empty stretch", |all| all[1]["endOffset"] = all[1]["offset"].clone()),
        ("over each other", |all| all[1]["offset"] = all[0]["offset"].clone()),
        ("a negative size", |all| all[0]["size"] = json!(-1)),
        ("no such size", |all| all[0]["size"] = json!(u64::MAX)),
        ("no digest", |all| all[0]["digest"] = json!("")),
        ("another kind of digest", |all| all[0]["digest"] = json!(format!("sha512:{}", "a".repeat(128)))),
        ("above the root", |all| all[0]["name"] = json!("../a")),
        ("a name twice", |all| all[1]["name"] = json!("./a")),
        ("no such type", |all| all[0]["type"] = json!("door")),
        ("no such owner", |all| all[0]["uid"] = json!(1_u64 << 40)),
        ("no such attribute", |all| all[0]["xattrs"] = json!({"user.a": "???"})),
        ("a link to nothing", |all| all.push(json!({"type": "hardlink", "name": "l", "linkName": "none"}))),
        ("a link out of it", |all| all.push(json!({"type": "hardlink", "name": "l", "linkName": "../../a"}))),
        ("a link to itself", |all| all.push(json!({"type": "hardlink", "name": "l", "linkName": "l"}))),
        ("a link without an end", |all| {
            all.push(json!({"type": "symlink", "name": "l", "linkName": "l"}));
            all.push(json!({"type": "dir", "name": "l/d"}));
        }),
        ("a link to no place", |all| all.push(json!({"type": "symlink", "name": "l"}))),
        ("another thing on the way", |all| all.push(json!({"type": "dir", "name": "a/d"}))),
        ("small data of another digest", |all| {
            all.push(json!({"type": "reg", "name": "s", "size": 1, "digest": Digest::of(b"x"), "kilnData": "eQ=="}));
        }),
        ("small data of another length", |all| {
            all.push(json!({"type": "reg", "name": "s", "size": 2, "digest": Digest::of(b"x"), "kilnData": "eA=="}));
        }),
        ("small files beside the blob", |all| {
            all.push(
                json!({"type": "reg", "name": "s", "size": 2, "digest": Digest::of(b"xy"), "offset": 1_u64 << 40,
                "endOffset": (1_u64 << 40) + 20}),
            );
        }),
    ];
    for (what, change) in changes {
        let mut entries = good.entries.clone();
        change(&mut entries);
        let toc = json!({"version": 1, "entries": entries}).to_string();
        let server = serve(good.image(toc.as_bytes(), |_| ()));
        let store = TestStore::new();
        let error = pull(&store, &registry, &server.image(), true).expect_err(what);
        assert!(!error.to_string().is_empty() && is_untouched(&store.store), "{what}: {error}");
        let pulled =
            pull(&store, &registry, &server.image(), false).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(pulled.image.whole, "{what}: whole it is sound");
    }
    let tables: [(&str, &[u8]); 6] = [
        ("no JSON", b"{"),
        ("nothing", b""),
        ("no table", b"[1, 2]"),
        ("of a later version", br#"{"version": 2, "entries": []}"#),
        ("entries twice", br#"{"version": 1, "entries": [], "entries": []}"#),
        ("more behind it", br#"{"version": 1, "entries": []} x"#),
    ];
    for (what, toc) in tables {
        let server = serve(good.image(toc, |_| ()));
        let store = TestStore::new();
        let error = pull(&store, &registry, &server.image(), true).expect_err(what);
        assert!(is_untouched(&store.store), "{what}: {error}");
    }
    let toc = good.toc();
    let says: Vec<(&str, Value, &str)> = vec![
        (TOC_DIGEST, json!(Digest::of(b"other")), "wrong digest"),
        (TOC_DIGEST, json!("sha256:x"), "digest"),
        (TOC_POSITION, json!("1:2:3"), "no place"),
        (TOC_POSITION, json!("a:b:c:d"), "no place"),
        (TOC_POSITION, json!("18446744073709551615:10:10:1"), "outside"),
        (TOC_POSITION, json!("8:4000000000:10:1"), "at most"),
        (TOC_POSITION, json!("8:10:4000000000:1"), "at most"),
        (TOC_POSITION, json!("8:10:10:7"), "type 7"),
    ];
    for (key, value, part) in says {
        let what = format!("{key} {value}");
        let server = serve(good.image(&toc, |annotations| annotations[key] = value));
        let store = TestStore::new();
        let error = pull(&store, &registry, &server.image(), true).expect_err(&what).to_string();
        assert!(error.contains(part) && is_untouched(&store.store), "{what}: {error}");
    }
    // A table that unpacks to more, and to less, than is said.
    for change in [-1_i64, 1] {
        let server = serve(good.image(&toc, |annotations| {
            let position = annotations[TOC_POSITION].as_str().unwrap().to_owned();
            let mut numbers: Vec<i64> = position.split(':').map(|number| number.parse().unwrap()).collect();
            numbers[2] += change;
            let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
            annotations[TOC_POSITION] = json!(numbers.join(":"));
        }));
        let store = TestStore::new();
        let error = pull(&store, &registry, &server.image(), true).unwrap_err().to_string();
        assert!(error.contains("unpacked has") && is_untouched(&store.store), "{error}");
    }
}

#[test]
fn an_object_that_is_not_what_the_table_says_is_never_kept() {
    let (registry, _conf) = plain_registry();
    let bomb = vec![1; 64 << 20];
    let cases: Vec<(&str, Made)> = vec![
        ("another content", made(&[2; 3000], |frames| frames)),
        ("too little", made(&[1; 2999], |frames| frames)),
        ("too much", made(&[1; 3001], |frames| frames)),
        ("a bomb", made(&bomb, |frames| frames)),
        ("nothing", made(&[], |frames| frames)),
    ];
    for (what, made) in cases {
        let server = serve(made.image(&made.toc(), |_| ()));
        let store = TestStore::new();
        let pulled = pull(&store, &registry, &server.image(), true).unwrap();
        assert_eq!(pulled.layers_lazy, 1, "{what}");
        let fetch =
            |digest: &Digest| store.store.fetch_object(digest, &registry.repair(&store.store, &Silent));
        let error = fetch(&made.files[0]).expect_err(what);
        assert!(matches!(error, StoreError::NotFetched { .. }), "{what}: {error}");
        assert!(!store.store.object_path(&made.files[0]).exists(), "{what}");
        // What is beside it is not touched by that.
        fetch(&made.files[1]).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(objects(&store.store), 1, "{what}");
        assert_eq!(std::fs::read_dir(store.store.path().join("tmp")).unwrap().count(), 0, "{what}");
        assert!(fetch(&Digest::of(b"nobody's")).is_err(), "{what}");
    }
    for (what, frames) in [("no frames", b"nonsense".to_vec()), ("a frame that breaks off", Vec::new())] {
        let made =
            made(
                &[1; 3000],
                |whole| if frames.is_empty() { whole[..whole.len() / 2].to_vec() } else { frames },
            );
        let server = serve(made.image(&made.toc(), |_| ()));
        let store = TestStore::new();
        pull(&store, &registry, &server.image(), true).unwrap();
        let fetch =
            |digest: &Digest| store.store.fetch_object(digest, &registry.repair(&store.store, &Silent));
        // The good one comes, although what lies behind it is none.
        fetch(&made.files[0]).unwrap_or_else(|error| panic!("{what}: {error}"));
        fetch(&made.files[1]).expect_err(what);
        assert_eq!(objects(&store.store), 1, "{what}");
    }
}

#[test]
fn a_table_is_believed_for_its_own_manifest_only() {
    let (registry, _conf) = plain_registry();
    let honest = made(&[1; 3000], |frames| frames);
    // Of the same tar it tells that `a` belongs to somebody else.
    let mut lie = made(&[1; 3000], |frames| frames);
    lie.entries[0]["uid"] = json!(4242);
    let (honest_server, lying_server) =
        (serve(honest.image(&honest.toc(), |_| ())), serve(lie.image(&lie.toc(), |_| ())));
    let store = TestStore::new();
    let lied = pull(&store, &registry, &lying_server.image(), true).unwrap().image;
    let told = pull(&store, &registry, &honest_server.image(), true).unwrap().image;
    assert_ne!(lied.layers, told.layers);
    let whole = pull(&store, &registry, &honest_server.image(), false).unwrap();
    assert_eq!(
        (whole.layers_pulled, &whole.image.layers),
        (1, &told.layers),
        "the tar came, and is what was told"
    );
    // With the tar here, nobody believes the table any more.
    let now = store.store.image(&lied.manifest_digest).unwrap().unwrap();
    assert!(now.whole && now.layers == told.layers);
    assert_eq!(store.store.check(None).unwrap().damaged, [""; 0]);
}

#[test]
fn a_layer_whose_record_is_lost_or_of_another_version_is_pulled_again() {
    let (registry, _conf) = plain_registry();
    let made = made(&[1; 3000], |frames| frames);
    let server = serve(made.image(&made.toc(), |_| ()));
    let lose: [fn(&std::path::Path); 2] = [
        |record| std::fs::remove_file(record).unwrap(),
        |record| {
            let mut bytes = std::fs::read(record).unwrap();
            bytes[8] = 9;
            std::fs::write(record, bytes).unwrap();
        },
    ];
    for lose in lose {
        for lazy in [true, false] {
            let store = TestStore::new();
            let before = pull(&store, &registry, &server.image(), true).unwrap().image;
            for record in std::fs::read_dir(store.store.path().join("lazy")).unwrap() {
                lose(&record.unwrap().path());
            }
            let again = pull(&store, &registry, &server.image(), lazy).unwrap();
            assert_eq!((again.layers_lazy, again.image.whole), (usize::from(lazy), !lazy));
            assert_eq!(again.image.layers, before.layers);
        }
    }
}

#[test]
fn a_server_without_ranges_gives_layers_whole() {
    let (registry, _conf) = plain_registry();
    let made = made(&[1; 3000], |frames| frames);
    let image = made.image(&made.toc(), |_| ());
    let server = Server::start(move |request, _| {
        let mut request = request.clone();
        request.headers.remove("range");
        image.answer(&request)
    });
    let store = TestStore::new();
    let pulled = pull(&store, &registry, &server.image(), true).unwrap();
    assert_eq!((pulled.layers_lazy, pulled.layers_pulled, pulled.image.whole), (0, 1, true));
    let store = TestStore::new();
    let gzipped = HandMade::new(&[tar(&[("a", &[1; 500])])]);
    let server = serve(gzipped);
    let pulled = pull(&store, &registry, &server.image(), true).unwrap();
    assert_eq!((pulled.layers_lazy, pulled.layers_pulled, pulled.image.whole), (0, 1, true));
}

#[test]
fn many_who_want_an_object_fetch_it_once_and_a_registry_that_comes_back_is_asked_again() {
    let (registry, _conf) = support::registry(|config, _| config.retries = Some(0));
    let made = made(&[1; 3000], |frames| frames);
    let image = made.image(&made.toc(), |_| ());
    let gone = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_gone = std::sync::Arc::clone(&gone);
    let server = Server::start(move |request, _| {
        if is_gone.load(std::sync::atomic::Ordering::Relaxed) {
            Reply::new(503, "")
        } else {
            image.answer(request)
        }
    });
    let store = TestStore::new();
    pull(&store, &registry, &server.image(), true).unwrap();
    gone.store(true, std::sync::atomic::Ordering::Relaxed);
    let fetch = |digest: &Digest| store.store.fetch_object(digest, &registry.repair(&store.store, &Silent));
    let error = fetch(&made.files[0]).unwrap_err().to_string();
    assert!(error.contains("cannot be fetched"), "{error}");
    assert_eq!(objects(&store.store), 0);
    gone.store(false, std::sync::atomic::Ordering::Relaxed);
    let blob_requests =
        || server.requests().iter().filter(|request| request.headers.contains_key("range")).count();
    let before = blob_requests();
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for at in 0..8 {
            let (barrier, fetch) = (&barrier, &fetch);
            scope.spawn(move || {
                barrier.wait();
                fetch(&made.files[at % 2]).unwrap();
            });
        }
    });
    assert!((1..=2).contains(&(blob_requests() - before)), "{}", blob_requests() - before);
    assert_eq!(objects(&store.store), 2);
}

#[test]
fn collections_keep_what_is_here_of_lazy_layers_and_repairs_make_them_whole() {
    let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let (registry, _conf) = plain_registry();
    let here = TestStore::new();
    let files: Vec<Vec<u8>> = (0..3).map(|at| noise(2 << 20)[at..].to_vec()).collect();
    let tar = tar(&[("a", &files[0]), ("b", &files[1]), ("c", &files[2])]);
    let layer = here.store.import_tar(&tar[..], None, ImportLimits::default()).unwrap().layer;
    let image = here.store.make_image(&Default::default(), &[layer]).unwrap();
    let to = name(&format!("{}/team/app:1", server.address()));
    let options = PushOptions { packing: Packing::Chunked, ..PushOptions::default() };
    registry.push(&here.store, &image, &to, &options, &Silent).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let home = Home::at(directory.path());
    let store = TestStore { store: Store::open(&home).unwrap(), ..TestStore::new() };
    pull(&store, &registry, &to, true).unwrap();
    let wanted = Digest::of(&files[1]);
    store.store.fetch_object(&wanted, &registry.repair(&store.store, &Silent)).unwrap();
    let up_to_date = pull(&store, &registry, &to, true).unwrap();
    assert!(up_to_date.up_to_date && !up_to_date.image.whole);
    drop(store);
    let collect = |all| {
        let options = GcOptions { all, ..GcOptions::default() };
        Store::gc::<StoreError>(&home, || Ok(Vec::new()), &options).unwrap()
    };
    let report = collect(false);
    assert_eq!((report.objects, report.layers), (0, 0), "{report:?}");
    let store = TestStore { store: Store::open(&home).unwrap(), ..TestStore::new() };
    assert!(store.store.object_path(&wanted).exists());

    // What is damaged of it is damage; what is not here is none.
    std::fs::remove_file(store.store.object_path(&wanted)).unwrap();
    std::fs::write(store.store.object_path(&wanted), b"wrong").unwrap();
    let report = store.store.check(None).unwrap();
    assert_eq!((report.damaged.len(), report.absent.len()), (1, 1), "{report:?}");
    let report = store.store.check(Some(&registry.repair(&store.store, &Silent))).unwrap();
    assert_eq!((report.damaged.len(), report.absent.len()), (0, 0), "{report:?}");
    assert!(store.store.resolve(&to.to_string()).unwrap().whole);
    drop(store);
    assert_eq!(collect(false).objects, 0);
    assert_eq!(
        std::fs::read_dir(home.path().join("store/lazy")).unwrap().count(),
        0,
        "the record is of no use"
    );
    assert_eq!(collect(true).layers, 1);
}
