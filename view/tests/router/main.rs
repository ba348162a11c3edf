//! The router: one mount in which each process tree sees its own view, and the service that has it.
#![cfg(target_os = "linux")]

mod changed;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use kiln_contract::{Digest, ErrorKind, Home};
use kiln_fixtures::{OrdinaryUser, with_private_mounts};
use kiln_store::Store;
use kiln_view::router::{self, Client};
use kiln_view::views::{Backend, NewView, Views};

/// Set for the process that is the service.
const SERVICE: &str = "KILN_TEST_SERVICE";

/// This test program as the service.
fn launch(home: &Home, idle: Duration) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_service_itself", "--nocapture", "--test-threads=1"]);
    command.env(SERVICE, format!("{}:{}", idle.as_millis(), home.path().display()));
    command
}

/// Does nothing as a test: this is where [`launch`] arrives.
#[test]
fn the_service_itself() {
    let Ok(said) = std::env::var(SERVICE) else { return };
    let (idle, home) = said.split_once(':').unwrap();
    router::serve(&Views::open(&Home::at(home)), Duration::from_millis(idle.parse().unwrap()), || {})
        .unwrap();
}

/// A home, and a directory where its views are seen.
struct Ground {
    directory: PathBuf,
    home: Home,
    views: Views,
}

impl Ground {
    fn at(&self) -> PathBuf {
        self.directory.join("at")
    }

    /// A layer of files, by path and content.
    fn layer(&self, files: &[(&str, &str)]) -> Digest {
        let directory = tempfile::tempdir_in(&self.directory).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for (path, content) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        Store::open(&self.home).unwrap().import_upper(directory.path(), &[], &|id, _| id).unwrap().layer
    }

    fn new_view(&self, name: &str, layer: Digest, editable: bool) -> NewView {
        NewView {
            name: name.to_owned(),
            reference: name.to_owned(),
            image: Digest::of(b"no image"),
            layers: vec![layer],
            at: self.at(),
            backend: Some(Backend::Router),
            editable,
            keep: false,
            command: Vec::new(),
            binds: Vec::new(),
            annotations: std::collections::BTreeMap::new(),
        }
    }

    fn show(&self, name: &str, layer: Digest, editable: bool, pid: u32) {
        self.views.create(self.new_view(name, layer, editable)).unwrap().show_to(pid).unwrap();
    }

    fn client(&self) -> Client {
        Client::connect(&self.home).unwrap().expect("the service runs")
    }

    /// How many mounts lie at the path.
    fn mounts(&self) -> usize {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let at = format!(" {} ", self.at().display());
        table.lines().filter(|line| line.contains(&at)).count()
    }

    fn kill_service(&self) {
        let pid = rustix::process::Pid::from_raw(self.client().status().unwrap().pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap();
    }
}

/// Runs a test as root with a mount namespace of its own.
fn with_ground(body: impl FnOnce(&Ground) + Send + 'static) {
    with_private_mounts(|directory| {
        let home = Home::at(directory.join("home"));
        fs::create_dir(directory.join("at")).unwrap();
        let views = Views::open(&home).served_by(launch);
        let ground = Ground { directory: directory.to_owned(), home, views };
        body(&ground);
        if let Ok(Some(mut client)) = Client::connect(&ground.home) {
            client.shutdown().unwrap();
        }
    });
}

/// A shell that does as it is told. It ends when this is dropped.
struct Shell {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn new(at: &Path) -> Self {
        let mut child =
            Command::new("sh").env("at", at).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What a script says, up to its end.
    fn ask(&mut self, script: &str) -> String {
        writeln!(self.input.as_ref().unwrap(), "{{ {script}\n}} 2>&1; echo; echo =end=").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        let mut said = String::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the shell ended: {said}");
            if line == "=end=\n" {
                return said.trim().to_owned();
            }
            said.push_str(&line);
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// Waits until something is so.
#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("not within 10 s: {what}");
}

/// What a shell does with names that others have too: each line is what was wrong. It starts no other process.
const HAMMER: &str = r#"
    mine() { read -r x < "$at/$1" && [ "$x" = "$me" ] || echo "$1 is $x"; }
    n=0
    while [ $n -lt $rounds ]; do
        n=$((n + 1))
        mine file; mine dir/file; mine dir/deep/file; mine only-$me
        [ -e "$at/only-$other" ] && echo "$other is seen"
        set -- "$at"/*; [ "$*" = "$at/dir $at/file $at/file2 $at/kind $at/only-$me" ] || echo "listed: $*"
        cd "$at/kind" 2>/dev/null && kind=directory || read -r kind < "$at/kind"
        [ "$kind" = "$expected" ] || echo "the kind is $kind"
        cd "$at"; read -r x < dir/file; [ "$x" = "$me" ] || echo "relative: $x"; cd /
        echo "$me$n" > "$at/dir/new"; read -r x < "$at/dir/new"; [ "$x" = "$me$n" ] || echo "written: $x"
        echo "$me$n" > "$at/dir/file2"; : > "$at/file2"; echo "$me$n" >> "$at/file2"
        read -r x < "$at/file2"; [ "$x" = "$me$n" ] || echo "written to the root: $x"
    done"#;

#[test]
fn views_of_one_mount_never_see_each_others_files_under_the_same_names() {
    with_ground(|ground| {
        let content = |me: &'static str, kind: &'static str| {
            let only = if me == "A\n" { "only-A" } else { "only-B" };
            [("file", me), ("dir/file", me), ("dir/deep/file", me), (only, me), (kind, "text\n")]
        };
        // Of the same name, a directory here and a file there.
        let layers = [ground.layer(&content("A\n", "kind/inside")), ground.layer(&content("B\n", "kind"))];
        let mut shells: Vec<Shell> = (0..4).map(|_| Shell::new(&ground.at())).collect();
        for (number, shell) in shells.iter().enumerate() {
            ground.show(&format!("v{number}"), layers[number % 2], true, shell.pid());
        }
        assert_eq!(ground.mounts(), 1);
        for (number, shell) in shells.iter_mut().enumerate() {
            let (me, other, kind) =
                if number % 2 == 0 { ("A", "B", "directory") } else { ("B", "A", "text") };
            let head =
                format!("me={me}; other={other}; expected={kind}; rounds=300; : > $at/file2; {HAMMER}");
            writeln!(shell.input.as_ref().unwrap(), "{{ {head}\n}} 2>&1; echo =end=").unwrap();
        }
        for shell in &mut shells {
            assert_eq!(shell.answer(), "");
        }
    });
}

#[test]
fn what_is_moved_into_the_root_is_not_seen_by_others() {
    with_ground(|ground| {
        let layer = ground.layer(&[("dir/sub/file", "A"), ("dir/other", "o")]);
        let (mut one, mut two) = (Shell::new(&ground.at()), Shell::new(&ground.at()));
        ground.show("one", layer, true, one.pid());
        ground.show("two", ground.layer(&[("name", "two"), ("dir/x", "x")]), true, two.pid());
        for (script, theirs) in [
            ("cat $at/dir/sub/file; mv $at/dir/sub $at/name; cat $at/name/file", "AA"),
            ("mv $at/name $at/dir/back; mv $at/dir/other $at/name; cat $at/name", "o"),
            ("mv $at/dir/back/file $at/name; cat $at/name; cat $at/dir/back/file", "Acat: "),
            (
                "mkdir $at/dir/d; ls $at/dir/d; mv -T $at/dir/d $at/d; rmdir $at/d; mkdir $at/d; ls $at",
                "d\ndir\nname",
            ),
        ] {
            let said = one.ask(script);
            assert!(said.starts_with(theirs), "{script}: {said}");
            assert_eq!(two.ask("cat $at/name; ls $at"), "twodir\nname", "{script}");
        }
    });
}

#[test]
fn the_nearest_ancestor_decides_and_who_has_none_sees_an_empty_directory() {
    with_ground(|ground| {
        let (outer, inner) = (ground.layer(&[("f", "outer")]), ground.layer(&[("f", "inner")]));
        let mut shell = Shell::new(&ground.at());
        ground.show("outer", outer, false, shell.pid());
        assert_eq!(shell.ask("cat $at/f; sh -c 'cat $at/f'"), "outerouter");
        // A shell in the shell.
        let pid: u32 = shell
            .ask("exec 3>&1; mkfifo $at/../in; sh < $at/../in & exec 4> $at/../in; echo $!")
            .parse()
            .unwrap();
        ground.show("inner", inner, true, pid);
        assert_eq!(shell.ask("echo 'cat $at/f $at/f; echo x > $at/g; echo; echo =end= ' >&4").as_str(), "");
        assert_eq!(shell.answer(), "innerinner");
        assert_eq!(shell.ask("cat $at/f; cat $at/g 2>/dev/null"), "outer");
        let gone = ground.client().unmount_process(pid).unwrap();
        assert_eq!(gone, ["inner"]);
        shell.ask("echo 'cat $at/f; echo; echo =end=' >&4");
        assert_eq!(shell.answer(), "outer");
        shell.ask("exec 4>&-");
        // This process has no view.
        assert_eq!(fs::read_dir(ground.at()).unwrap().count(), 0);
        assert!(fs::metadata(ground.at().join("f")).is_err());
        let refused = fs::write(ground.at().join("new"), "").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        // One that can only be read says so.
        assert!(shell.ask("echo > $at/f; rm $at/f; mkdir $at/d").matches("Read-only").count() == 3);
        let error = ground.client().unmount_process(pid).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    });
}

#[test]
fn who_was_seen_in_a_view_keeps_it_when_its_ancestors_end_and_the_view_goes_with_the_last() {
    with_ground(|ground| {
        let mut shell = Shell::new(&ground.at());
        ground.show("v", ground.layer(&[("f", "mine")]), false, shell.pid());
        // It is seen, then loses its parents, and then looks again.
        let script = "mkfifo go
            ( ( read l < $at/f; echo $l > first; read x < go; cat $at/f > second ) > /dev/null 2>&1 &
              while [ ! -s first ]; do sleep 0.02; done ) & wait";
        shell.ask(&format!("cd {}; {script}", ground.directory.display()));
        let read = |name: &str| fs::read_to_string(ground.directory.join(name)).unwrap_or_default();
        until("the orphan has looked", || read("first") == "mine\n");
        drop(shell);
        // Its first ancestor is gone, and the view is not.
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(ground.views.list().unwrap().len(), 1);
        fs::write(ground.directory.join("go"), "\n").unwrap();
        until("the orphan has looked again", || read("second") == "mine");
        until("the view is gone", || ground.views.list().unwrap().is_empty());
        until("the mount is gone", || ground.mounts() == 0);
    });
}

#[test]
fn a_service_that_was_killed_is_replaced_and_shows_the_same_again() {
    with_ground(|ground| {
        let mut shells = [Shell::new(&ground.at()), Shell::new(&ground.at()), Shell::new(&ground.at())];
        for (name, shell) in ["a", "b", "c"].iter().zip(&shells) {
            ground.show(name, ground.layer(&[("f", name)]), true, shell.pid());
        }
        assert_eq!(shells[1].ask("echo changed > $at/g; cat $at/f $at/g"), "bchanged");
        ground.kill_service();
        assert!(shells[0].ask("cat $at/f").contains("not connected"));
        drop(shells[2].input.take());
        shells[2].child.wait().unwrap();
        router::connect_or_start(&ground.home, launch).unwrap();
        assert_eq!(ground.mounts(), 1);
        assert_eq!(shells[0].ask("cat $at/f"), "a");
        assert_eq!(shells[1].ask("cat $at/f $at/g"), "bchanged");
        let mut shown = ground.client().status().unwrap().views;
        shown.sort_by(|one, other| one.name.cmp(&other.name));
        let told: Vec<_> = shown.iter().map(|view| (view.name.as_str(), view.processes.clone())).collect();
        assert_eq!(told, [("a", vec![shells[0].pid()]), ("b", vec![shells[1].pid()])]);
        // Whose process had ended meanwhile is what a killed process left.
        assert_eq!(ground.views.prune(false).unwrap(), ["c"]);
        // Told to end, it takes the mount away, and the next shows it again too.
        ground.client().shutdown().unwrap();
        until("the mount is gone", || ground.mounts() == 0);
        router::connect_or_start(&ground.home, launch).unwrap();
        assert_eq!(shells[1].ask("cat $at/f $at/g"), "bchanged");
    });
}

#[test]
fn a_service_starts_once_and_ends_when_it_shows_nothing() {
    with_ground(|ground| {
        let idle = Duration::from_secs(2);
        assert!(Client::connect(&ground.home).unwrap().is_none());
        router::start(&ground.home, idle, launch).unwrap();
        let pid = ground.client().status().unwrap().pid;
        // Another one finds the lock taken, and leaves it at that.
        router::start(&ground.home, idle, launch).unwrap();
        assert_eq!(ground.client().status().unwrap().pid, pid);
        let shell = Shell::new(&ground.at());
        ground.show("v", ground.layer(&[("f", "f")]), false, shell.pid());
        std::thread::sleep(idle + idle / 4);
        assert_eq!(ground.client().status().unwrap().pid, pid);
        drop(shell);
        until("the service has ended", || Client::connect(&ground.home).unwrap().is_none());
        assert_eq!(ground.mounts(), 0);
        assert!(!ground.home.router().join("socket").exists());
    });
}

#[test]
fn what_cannot_be_shown_is_refused_and_leaves_nothing() {
    with_ground(|ground| {
        let layer = ground.layer(&[("f", "f")]);
        let show =
            |name: &str, pid| ground.views.create(ground.new_view(name, layer, false)).unwrap().show_to(pid);
        let error = show("none", 4_000_000).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::NotFound, "there is no process 4000000")
        );
        let shell = Shell::new(&ground.at());
        show("first", shell.pid()).unwrap();
        let error = show("second", shell.pid()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.hint_text().unwrap().contains("kiln fs unmount"), "{error:?}");
        let names: Vec<String> = ground.views.list().unwrap().into_iter().map(|view| view.name).collect();
        assert_eq!(names, ["first"]);
        let error = ground.client().mount("nothing", shell.pid()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(ground.views.remove("first").unwrap_err().kind(), ErrorKind::State);
    });
}

/// Set for the process that asks as somebody else.
const SOCKET: &str = "KILN_TEST_SOCKET";

/// Asks a service for its status, past all that Kiln's own client looks at first.
fn ask_directly(socket: &str) -> Result<u32, tonic::Status> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("unix:{socket}")).unwrap();
        let channel =
            endpoint.connect().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let mut api = router::api::RouterClient::new(channel);
        Ok(api.status(router::api::StatusRequest {}).await?.into_inner().pid)
    })
}

#[test]
fn the_service_answers_its_owner_only() {
    if let Ok(socket) = std::env::var(SOCKET) {
        let code = ask_directly(&socket).unwrap_err().code();
        writeln!(std::io::stdout(), "asked: {code:?}").unwrap();
        return;
    }
    let Some(user) = OrdinaryUser::get() else { return };
    with_ground(move |ground| {
        router::start(&ground.home, Duration::from_secs(60), launch).unwrap();
        let socket = ground.home.router().join("socket");
        let ask = || {
            let mut asked = user.command(&std::env::current_exe().unwrap());
            asked.args(["--exact", "the_service_answers_its_owner_only", "--nocapture"]).env(SOCKET, &socket);
            let asked = asked.output().unwrap();
            let said = String::from_utf8_lossy(&asked.stdout).into_owned();
            said.lines().find_map(|line| line.strip_prefix("asked: ")).map(str::to_owned).unwrap_or(said)
        };
        assert!(ask_directly(socket.to_str().unwrap()).is_ok());
        // He cannot even reach it.
        assert_eq!(ask(), "Unavailable");
        // And where modes would let him, the service asks the kernel who he is.
        for (path, mode) in [
            (ground.directory.as_path(), 0o755),
            (ground.home.path(), 0o755),
            (&ground.home.router(), 0o755),
            (&socket, 0o666),
        ] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(ask(), "PermissionDenied");
    });
}

#[test]
fn a_socket_of_another_users_is_not_asked() {
    let Some(user) = OrdinaryUser::get() else { return };
    with_ground(move |ground| {
        router::start(&ground.home, Duration::from_secs(60), launch).unwrap();
        assert!(Client::connect(&ground.home).unwrap().is_some());
        let socket = ground.home.router().join("socket");
        let give = |uid| std::os::unix::fs::lchown(&socket, Some(uid), None).unwrap();
        // It would answer: only whose it is has changed. Whoever made it could be somebody who pretends to be the service.
        give(user.uid);
        assert!(ask_directly(socket.to_str().unwrap()).is_ok());
        for asked in [Client::connect(&ground.home).map(drop), ground.views.router().map(drop)] {
            let refused = asked.unwrap_err();
            let what =
                format!("the service of views in {} is another user's", ground.home.router().display());
            assert_eq!(
                (refused.kind(), refused.to_string(), refused.hint_text()),
                (ErrorKind::State, what, Some("use a KILN_HOME of your own"))
            );
        }
        give(0);
        assert!(Client::connect(&ground.home).unwrap().is_some());
    });
}
