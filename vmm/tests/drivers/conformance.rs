//! What every driver does.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_contract::{ErrorKind, Vm, VmState};
use kiln_link::HostLink;
use kiln_link::message::Answer;

use crate::bed::{Bed, MEMORY, ask, begin, greet, run, stream};

/// A test of the table.
pub(crate) type Test = fn(&Bed);

/// All of it.
pub(crate) const TABLE: &[(&str, Test)] = &[
    ("a machine is made, starts, says hello and is killed", starts_and_is_killed),
    ("a paused machine does nothing until it goes on", pauses),
    ("machines of one template live side by side, and it stays as it was", clones),
    ("a machine that is saved goes on, and its copy begins a life of its own", saves_and_goes_on),
    ("a copy of a copy has what both have changed", saves_again),
    ("a machine that is handed over goes on, is saved, and ends with whoever has it", hands_over),
    ("what is no saved machine is an error and not a wait", refuses_other_states),
    ("what cannot boot is an error and not a wait", refuses_to_boot_nonsense),
    ("a disk may grow and a balloon may be blown up", grows_and_shrinks),
    ("a machine that is dropped is gone, with its process and its link", leaves_nothing),
    ("what a saved state depends on does not change by itself", has_a_fingerprint),
];

fn starts_and_is_killed(bed: &Bed) {
    let mut vm = bed.hypervisor.create(&bed.config(true)).unwrap();
    assert_eq!(vm.state().unwrap(), VmState::Created);
    assert!(is_there(vm.pid().unwrap()));
    let link = vm.link().unwrap();
    assert_eq!(vm.link().unwrap_err().kind(), ErrorKind::State, "there is one link, given once");
    vm.resume().unwrap();
    assert_eq!(vm.state().unwrap(), VmState::Running);
    vm.resume().unwrap();
    assert_eq!(vm.state().unwrap(), VmState::Running, "a start of what runs changes nothing");
    run(async {
        let session = begin(greet(link).await).await;
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
    });
    vm.kill().unwrap();
    assert_eq!(vm.state().unwrap(), VmState::Stopped);
    vm.kill().unwrap();
    assert!(vm.pause().is_err() && vm.resume().is_err(), "what is gone does nothing");
}

fn pauses(bed: &Bed) {
    let (mut vm, link) = bed.restored();
    run(async {
        let session = begin(HostLink::restored(stream(link))).await;
        ask(&session).await;
        vm.pause().unwrap();
        assert_eq!(vm.state().unwrap(), VmState::Paused);
        vm.pause().unwrap();
        let waiting = tokio::time::timeout(Duration::from_millis(400), ask(&session)).await;
        assert!(waiting.is_err(), "a paused guest answers");
        vm.resume().unwrap();
        assert_eq!(vm.state().unwrap(), VmState::Running);
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
    });
}

fn clones(bed: &Bed) {
    let memory = bed.template().join("memory");
    let before = digest(&memory);
    let begun = Instant::now();
    let clones: Vec<_> = (0..3).map(|_| bed.restored()).collect();
    let (mut machines, links): (Vec<_>, Vec<_>) = clones.into_iter().unzip();
    run(async {
        let mut sessions = Vec::new();
        for link in links {
            sessions.push(begin(HostLink::restored(stream(link))).await);
        }
        for session in &sessions {
            assert!(matches!(ask(session).await, Answer::Stats(_)));
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(60));
    for vm in &mut machines {
        assert_eq!(vm.state().unwrap(), VmState::Running);
    }
    assert_eq!(digest(&memory), before, "what machines write is their own");
}

fn saves_and_goes_on(bed: &Bed) {
    let (mut vm, link) = bed.restored();
    let saved = tempfile::tempdir().unwrap();
    run(async {
        let session = begin(HostLink::restored(stream(link))).await;
        ask(&session).await;
        // A stream that is open meanwhile.
        let mut open = session.open(kiln_link::service::CONTROL).await.unwrap();
        let parked = session.parker().park(Duration::from_secs(30)).await.unwrap();
        vm.pause().unwrap();
        vm.save(saved.path()).unwrap();
        vm.resume().unwrap();
        parked.resume().await.unwrap();
        // The same life, with every stream as it was.
        let request = kiln_link::message::Request::Stats;
        kiln_link::message::send(&mut open, &request).await.unwrap();
        let answer = kiln_link::message::receive::<_, Answer>(&mut open);
        let answer = tokio::time::timeout(Duration::from_secs(30), answer).await;
        assert!(matches!(answer.unwrap().unwrap(), Some(Answer::Stats(_))));
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
        // Another life, as often as one likes, beside the one that goes on.
        for _ in 0..2 {
            let mut copy = bed.hypervisor.restore(&bed.config(false), saved.path()).unwrap();
            let other = begin(HostLink::restored(stream(copy.link().unwrap()))).await;
            assert!(matches!(ask(&other).await, Answer::Stats(_)));
        }
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
    });
}

fn saves_again(bed: &Bed) {
    let mut saved = bed.template();
    let mut kept = Vec::new();
    for _ in 0..3 {
        let mut vm = bed.hypervisor.restore(&bed.config(false), &saved).unwrap();
        let link = vm.link().unwrap();
        let next = tempfile::tempdir().unwrap();
        run(async {
            let session = begin(HostLink::restored(stream(link))).await;
            ask(&session).await;
            let parked = session.parker().park(Duration::from_secs(30)).await.unwrap();
            vm.pause().unwrap();
            vm.save(next.path()).unwrap();
            drop(parked);
        });
        saved = next.path().to_owned();
        kept.push(next);
    }
}

fn hands_over(bed: &Bed) {
    let config = bed.config(false);
    let mut vm = bed.hypervisor.restore(&config, &bed.template()).unwrap();
    let link = vm.link().unwrap();
    let copy = link.try_clone().unwrap();
    run(async {
        let session = begin(HostLink::restored(stream(link))).await;
        ask(&session).await;
        let parked = session.parker().park(Duration::from_secs(30)).await.unwrap();
        drop(session);
        drop(parked);
    });
    let handle = match vm.hand_over(copy) {
        Ok(handle) => handle,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            return;
        }
    };
    assert_eq!(handle.descriptors.len(), kiln_contract::VmHandle::DESCRIPTORS);
    let pid = handle.pid;
    let (owner, other) = UnixStream::pair().unwrap();
    let mut adopted = bed.hypervisor.adopt(&config, handle, owner.into()).unwrap();
    assert_eq!(adopted.pid(), Some(pid));
    assert_eq!(adopted.state().unwrap(), VmState::Running);
    let saved = tempfile::tempdir().unwrap();
    run(async {
        let session = begin(HostLink::restored(stream(adopted.link().unwrap()))).await;
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
        let parked = session.parker().park(Duration::from_secs(30)).await.unwrap();
        adopted.pause().unwrap();
        adopted.save(saved.path()).unwrap();
        adopted.resume().unwrap();
        parked.resume().await.unwrap();
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
        let mut copy = bed.hypervisor.restore(&bed.config(false), saved.path()).unwrap();
        let session = begin(HostLink::restored(stream(copy.link().unwrap()))).await;
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
    });
    drop(adopted);
    assert_eq!(vm.state().unwrap(), VmState::Stopped, "it ended with whoever had it");
    assert_eq!((&other).read(&mut [0]).unwrap(), 0, "who owns it is told");
    // Without what belongs to it there is nothing to take over.
    let nothing = kiln_contract::VmHandle { pid, memory_address: 0, descriptors: Vec::new() };
    let (owner, _) = UnixStream::pair().unwrap();
    let refused = bed.hypervisor.adopt(&config, nothing, owner.into()).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
}

fn refuses_other_states(bed: &Bed) {
    let other = |state: Option<&[u8]>| {
        let directory = tempfile::tempdir().unwrap();
        if let Some(state) = state {
            fs::write(directory.path().join("state"), state).unwrap();
        }
        directory
    };
    let sound = fs::read(bed.template().join("state")).unwrap();
    for (what, saved) in [
        ("nothing", other(None)),
        ("empty", other(Some(b""))),
        ("garbage", other(Some(&[0x5a; 9000]))),
        ("cut", other(Some(&sound[..sound.len() / 2]))),
    ] {
        match bed.hypervisor.restore(&bed.config(false), saved.path()) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(mut vm) => {
                let link = vm.link().unwrap();
                assert_ends(&mut *vm, link, what);
                assert!(vm.last_words().is_some(), "{what}: and says why");
            }
        }
    }
}

fn refuses_to_boot_nonsense(bed: &Bed) {
    let mut config = bed.config(true);
    let nonsense = config.directory.join("nonsense");
    fs::write(&nonsense, [0x5a; 100_000]).unwrap();
    if let Some(boot) = &mut config.boot {
        (boot.kernel, boot.vmlinux) = (nonsense.clone(), Some(nonsense));
    }
    match bed.hypervisor.create(&config) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(mut vm) => {
            let link = vm.link().unwrap();
            // Refused at once, or only seen to be nonsense when it is entered.
            if vm.resume().is_ok() {
                assert_ends(&mut *vm, link, "nonsense");
            }
        }
    }
}

/// The machine ends by itself, soon, and its link with it.
fn assert_ends(vm: &mut dyn Vm, link: std::os::fd::OwnedFd, what: &str) {
    let mut link = UnixStream::from(link);
    link.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let end = link.read(&mut [0; 64]);
    assert!(matches!(end, Ok(0)) || end.as_ref().is_err_and(is_reset), "{what}: {end:?}");
    let begun = Instant::now();
    while vm.state().ok() != Some(VmState::Stopped) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}: it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_reset(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionReset
}

fn grows_and_shrinks(bed: &Bed) {
    let config = bed.config(false);
    let mut vm = bed.hypervisor.restore(&config, &bed.template()).unwrap();
    let link = vm.link().unwrap();
    run(async {
        let session = begin(HostLink::restored(stream(link))).await;
        fs::File::options().write(true).open(&config.disk).unwrap().set_len(96 << 20).unwrap();
        vm.disk_resized(96 << 20).unwrap();
        for bytes in [MEMORY - (32 << 20), MEMORY] {
            vm.balloon(bytes).unwrap();
        }
        assert!(matches!(ask(&session).await, Answer::Stats(_)));
    });
}

fn leaves_nothing(bed: &Bed) {
    let (mut vm, link) = bed.restored();
    let pid = vm.pid().unwrap();
    assert!(is_there(pid));
    assert_ne!(vm.state().unwrap(), VmState::Stopped);
    drop(vm);
    assert!(!is_there(pid));
    let mut link = UnixStream::from(link);
    link.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let end = link.read_to_end(&mut Vec::new());
    assert!(end.is_ok() || end.as_ref().is_err_and(is_reset), "{end:?}");
}

fn has_a_fingerprint(bed: &Bed) {
    let said = bed.hypervisor.fingerprint();
    assert!(said.starts_with(bed.hypervisor.name()), "{said}");
    assert_eq!(said, bed.hypervisor.fingerprint());
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

fn digest(path: &Path) -> kiln_contract::Digest {
    kiln_contract::Digest::of(&fs::read(path).unwrap())
}
