//! Objects that come while an editable view is used.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use kiln_contract::Digest;
use kiln_erofs::object_redirect;
use kiln_view::Fetcher;
use kiln_view::fuse::{self, Served};

use crate::ground::with_ground_of_many;

#[test]
fn who_waits_for_an_object_that_is_being_fetched_keeps_nobody_from_changing_the_view() {
    with_ground_of_many(crate::Backend::Fuse, 3, |ground| {
        let wanted = "1\n".repeat(40);
        let redirect = object_redirect(&Digest::of(wanted.as_bytes()));
        let object = ground.at("objects").join(std::ffi::OsStr::from_bytes(&redirect[1..]));
        fs::rename(&object, ground.at("elsewhere")).unwrap();
        // It comes when it is told to.
        let script = format!(
            "touch $KILN_HOME/asked; until test -e $KILN_HOME/go; do sleep 0.02; done; mv $KILN_HOME/elsewhere {}",
            object.display()
        );
        let fetcher = Fetcher {
            program: "/bin/sh".into(),
            arguments: ["-c", &script, "sh"].map(Into::into).into(),
            home: ground.at("."),
        };
        let (tree, objects, scratch) = (ground.at("tree.erofs"), ground.at("objects"), ground.scratch());
        let served = Served { fetcher: Some(&fetcher), ..ground.served(&tree, &objects, Some(&scratch)) };
        let mounted = fuse::start(&served).unwrap().mount(&ground.at("view")).unwrap();
        let view = ground.at("view");
        let missing = view.join("many/1");
        let (told, read) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || told.send(fs::read(missing).unwrap()).unwrap());
        while !ground.at("asked").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let (told, changed) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            fs::write(view.join("new"), "new").unwrap();
            fs::rename(view.join("new"), view.join("a/newer")).unwrap();
            fs::write(view.join("many/2"), "changed").unwrap();
            let seen = ["a/newer", "many/2", "many/0"].map(|name| fs::read(view.join(name)).unwrap());
            told.send((seen, fs::read_dir(view.join("many")).unwrap().count())).unwrap();
        });
        let seen = changed.recv_timeout(Duration::from_secs(20));
        assert!(read.try_recv().is_err(), "nobody has brought the object");
        fs::write(ground.at("go"), "").unwrap();
        let (contents, names) = seen.expect("others go on meanwhile");
        assert_eq!(contents, [b"new".to_vec(), b"changed".to_vec(), b"0\n".repeat(40)]);
        assert_eq!(names, 3);
        assert_eq!(read.recv().unwrap(), wanted.as_bytes());
        reader.join().unwrap();
        writer.join().unwrap();
        mounted.unmount().unwrap();
    });
}
