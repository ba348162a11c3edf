//! Views are changed while they are shown.

use std::fs;

use kiln_contract::{Digest, ErrorKind};
use kiln_view::Bind;
use kiln_view::router;
use kiln_view::views::{Alteration, NewView};

use super::{Shell, launch, until, with_ground};

/// Another stack, as a view is told to show it.
fn stack(layers: &[Digest]) -> Alteration {
    let reference = "another".to_owned();
    Alteration::Show { reference, image: Digest::of(b"no image"), layers: layers.to_vec(), binds: Vec::new() }
}

#[test]
fn files_stay_open_over_any_number_of_stacks_and_what_is_written_to_them_is_seen() {
    with_ground(|ground| {
        let layers = [("f", "zero"), ("f", "one")].map(|file| ground.layer(&[file, ("dir/old", "old")]));
        let mut shells = [Shell::new(&ground.at()), Shell::new(&ground.at())];
        for (name, shell, editable) in [("edited", &shells[0], true), ("read", &shells[1], false)] {
            ground.show(name, layers[0], editable, shell.pid());
        }
        shells[0].ask("exec 3< $at/f; printf 1234 > $at/log; exec 4<> $at/log; cd $at/dir");
        shells[1].ask("exec 3< $at/f; cd $at/dir");
        // More often than what was shown before is kept for nothing but working directories.
        for round in 1..=40 {
            for name in ["edited", "read"] {
                ground.client().alter(name, &stack(&[layers[round % 2]])).unwrap();
            }
            let now = ["zero", "one"][round % 2];
            let seen = format!("cat $at/f; printf {}; cat $at/log", round % 10);
            assert!(shells[0].ask(&seen).starts_with(&format!("{now}{}1234", round % 10)), "{round}");
            assert_eq!(shells[1].ask("cat $at/f"), now, "{round}");
        }
        assert_eq!(shells[1].ask("cat <&3"), "zero");
        assert_eq!(shells[0].ask("cat <&3"), "zero");
        // The kernel does not know that both are one file. Bytes are changed, and then there are more.
        assert_eq!(shells[0].ask("printf ab >&4; cat $at/log; cat <&4; cat $at/log"), "ab3434ab34");
        assert_eq!(shells[0].ask("printf more >&4; cat $at/log; stat -c %s $at/log"), "ab34more8");
        assert_eq!(
            shells[0].ask("chmod 640 /proc/self/fd/4; stat -c %a $at/log /proc/self/fd/4 -L"),
            "640\n640"
        );
        assert_eq!(shells[0].ask("exec 4>&-; printf x >> $at/log; cat $at/log"), "ab34morex");
        // What is nowhere open has gone.
        assert_eq!(shells[1].ask("cat old; exec 3<&-"), "old");
        ground.client().alter("read", &stack(&[layers[1]])).unwrap();
        assert!(shells[1].ask("cat old").contains("tale"), "a working directory of long ago");
        assert_eq!(shells[1].ask("cd $at/dir; cat old"), "old");
        ground.client().alter("read", &stack(&layers)).unwrap();
        assert_eq!(shells[1].ask("cat old"), "old");
    });
}

#[test]
fn nothing_is_changed_by_name_in_what_was_shown_before() {
    with_ground(|ground| {
        let layers = [("f", "zero"), ("f", "one")].map(|file| ground.layer(&[file, ("dir/old", "old")]));
        let mut shell = Shell::new(&ground.at());
        ground.show("v", layers[0], true, shell.pid());
        shell.ask("printf a > $at/dir/a; printf b > $at/dir/b; exec 4>> $at/dir/a; cd $at/dir");
        ground.client().alter("v", &stack(&[layers[1]])).unwrap();
        for change in [
            "rm a",
            "mv a c",
            "echo > old",
            "printf x > new",
            "mkdir d",
            "ln -s x y",
            "chmod 600 b",
            "ln a z",
        ] {
            assert!(shell.ask(change).contains("Stale file handle"), "{change}");
        }
        assert_eq!(shell.ask("cat a old"), "aold");
        // The name is another file's meanwhile: what is open is what it was.
        shell.ask("rm $at/dir/a; echo other > $at/dir/a; printf z >&4; chmod 604 /proc/self/fd/4");
        assert_eq!(shell.ask("cat $at/dir/a; stat -L -c '%a %s' /proc/self/fd/4"), "other\n604 2");
        assert_eq!(shell.ask("stat -c %a $at/dir/a"), "644");
        let refused = ground.client().alter("v", &Alteration::Edit(false)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::State);
        assert!(refused.to_string().contains("open for writing"), "{refused}");
        assert_eq!(shell.ask("echo still > $at/dir/s; cat $at/dir/s; exec 4>&-"), "still");
        ground.client().alter("v", &Alteration::Edit(false)).unwrap();
        for change in [
            "rm $at/dir/s",
            "printf x > $at/dir/s",
            "echo > $at/dir/new",
            "chmod 600 $at/dir/s",
            "rmdir $at/dir",
        ] {
            assert!(shell.ask(change).contains("Read-only file system"), "{change}");
        }
        // The next service, and the next stack, let nothing be changed either.
        ground.client().alter("v", &stack(&[layers[0]])).unwrap();
        assert_eq!(shell.ask("cat $at/f $at/dir/s; rm $at/f 2>/dev/null || echo kept"), "zerostill\nkept");
        ground.kill_service();
        router::connect_or_start(&ground.home, launch).unwrap();
        assert_eq!(shell.ask("cat $at/f $at/dir/s; rm $at/f 2>/dev/null || echo kept"), "zerostill\nkept");
        ground.client().alter("v", &Alteration::Edit(true)).unwrap();
        assert_eq!(shell.ask("rm $at/f; ls $at"), "dir");
        ground.client().alter("v", &Alteration::Reset(vec![b"/f".to_vec()])).unwrap();
        assert_eq!(shell.ask("cat $at/f; ls $at/dir"), "zeroa\nb\nold\ns");
        // Without a word on what is to become of it, what its record says.
        ground.client().remount("v").unwrap();
        assert_eq!(shell.ask("cat $at/f; ls $at/dir"), "zeroa\nb\nold\ns");
    });
}

#[test]
fn who_changes_something_by_its_path_does_not_notice_that_another_stack_is_shown() {
    with_ground(|ground| {
        let layers = [("f", "zero"), ("f", "one")].map(|file| ground.layer(&[file, ("dir/sub/old", "old")]));
        let mut shell = Shell::new(&ground.at());
        ground.show("v", layers[0], true, shell.pid());
        let [go_on, count] = ["go-on", "count"].map(|name| ground.directory.join(name));
        fs::write(&go_on, "").unwrap();
        // The same names and new ones, in the root and below, and those of the stack.
        let work = format!(
            "n=0; while [ -e {} ]; do n=$((n + 1)); echo $n > {}
                echo $n > $at/top && echo $n > $at/dir/sub/low && echo $n > $at/dir/sub/$n && echo $n > $at/$n
                read -r x < $at/top; read -r y < $at/dir/sub/low; [ $x-$y = $n-$n ] || echo $x-$y is not $n
                read -r x < $at/dir/sub/$n; read -r y < $at/$n; [ $x-$y = $n-$n ] || echo $x-$y was not $n
            done",
            go_on.display(),
            count.display()
        );
        let changing = std::thread::spawn(move || shell.ask(&work));
        for round in 1..=60 {
            ground.client().alter("v", &stack(&[layers[round % 2]])).unwrap();
            // The kernel looks a path up once more, and not twice: what was looked up in this moment must be done.
            let before = fs::read_to_string(&count).unwrap_or_default();
            let now = || fs::read_to_string(&count).unwrap_or_default();
            until("it goes on", || ![before.as_str(), ""].contains(&now().as_str()));
        }
        fs::remove_file(&go_on).unwrap();
        assert_eq!(changing.join().unwrap(), "");
    });
}

#[test]
fn what_cannot_become_of_a_view_is_refused_and_it_is_as_it_was() {
    with_ground(|ground| {
        let layer = ground.layer(&[("f", "f")]);
        let mut shell = Shell::new(&ground.at());
        ground.show("v", layer, false, shell.pid());
        let record = ground.views.find("v").unwrap();
        let live = Bind { source: "/etc".into(), dest: "etc".into() };
        let Alteration::Show { reference, image, layers, .. } = stack(&[layer]) else { unreachable!() };
        let binds = vec![live.clone()];
        for (alteration, kind, says) in [
            (Alteration::Show { reference, image, layers, binds }, ErrorKind::Unsupported, "live layers"),
            (stack(&[Digest::of(b"no layer")]), ErrorKind::Failed, "is not in the store"),
            (Alteration::Reset(Vec::new()), ErrorKind::State, "never editable"),
        ] {
            let refused = ground.views.alter(&record, &alteration).unwrap_err();
            assert_eq!(refused.kind(), kind, "{alteration:?}: {refused:?}");
            assert!(refused.to_string().contains(says), "{refused}");
            assert_eq!(ground.views.find("v").unwrap(), record);
            assert_eq!(shell.ask("cat $at/f; ls $at"), "ff");
        }
        let error = ground.client().alter("none", &Alteration::Edit(true)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        // One with a live layer is not shown at all.
        let other = Shell::new(&ground.at());
        let new = NewView { binds: vec![live], ..ground.new_view("live", layer, false) };
        let refused = ground.views.create(new).unwrap().show_to(other.pid()).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.to_string().as_str(), refused.hint_text()),
            (
                ErrorKind::Unsupported,
                "live layers are shown in mount namespaces only, which the router does without",
                Some("use another --backend")
            )
        );
        assert_eq!(ground.views.list().unwrap().len(), 1);
    });
}
