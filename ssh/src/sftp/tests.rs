use std::os::unix::ffi::OsStrExt as _;

use proptest::prelude::*;

use super::*;

/// What the server says to these packets, each without its length.
fn talk(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut requests = Vec::new();
    for packet in packets {
        requests.put_string(packet);
    }
    let mut replies = Vec::new();
    serve(&requests[..], &mut replies).unwrap();
    let mut reader = Reader::new(&replies, "replies");
    std::iter::from_fn(|| reader.string().ok().map(<[u8]>::to_vec)).collect()
}

fn request(kind: u8) -> Vec<u8> {
    let mut request = vec![kind];
    request.put_number(7);
    request
}

/// The number in a status.
fn code(reply: &[u8]) -> u32 {
    let mut reader = Reader::new(reply, "status");
    assert_eq!(reader.byte().unwrap(), STATUS, "{reply:?}");
    assert_eq!(reader.number().unwrap(), 7);
    reader.number().unwrap()
}

#[test]
fn what_cannot_be_done_has_the_code_that_clients_act_on() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path().as_os_str().as_bytes();
    let mut missing = request(STAT);
    missing.put_string([here, b"/missing"].concat());
    let mut zero = request(STAT);
    zero.put_string(b"a\0b");
    let mut short = request(OPEN);
    short.put_string(b"x");
    let mut stray = request(READ);
    stray.put_string(9_u32.to_be_bytes()).put_long(0).put_number(10);
    let mut made_up = request(CLOSE);
    made_up.put_string("not four bytes");
    let replies = talk(&[missing, zero, short, stray, made_up, request(99)]);
    assert_eq!(replies.iter().map(|reply| code(reply)).collect::<Vec<_>>(), [2, 5, 5, 2, 5, 8]);
}

#[test]
fn open_files_have_a_bound_and_closing_makes_room() {
    let directory = tempfile::tempdir().unwrap();
    let mut open = request(OPENDIR);
    open.put_string(directory.path().as_os_str().as_bytes());
    let mut close = request(CLOSE);
    close.put_string(3_u32.to_be_bytes());
    let mut packets = vec![open.clone(); MOST_HANDLES as usize + 1];
    packets.extend([close, open]);
    let replies = talk(&packets);
    let kinds: Vec<u8> = replies.iter().map(|reply| reply[0]).collect();
    assert!(kinds[..MOST_HANDLES as usize].iter().all(|kind| *kind == HANDLE));
    assert_eq!(kinds[MOST_HANDLES as usize..], [STATUS, STATUS, HANDLE]);
}

#[test]
fn a_length_that_no_packet_has_ends_it() {
    for head in [0_u32, LONGEST_PACKET + 1, u32::MAX] {
        let ended = serve(&head.to_be_bytes()[..], Vec::new());
        assert!(matches!(ended, Err(SshError::Malformed(_))), "{head}");
    }
}

#[test]
fn a_pipe_that_nobody_reads_holds_nothing_up() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let mut cut = request(SETSTAT);
    cut.put_string(pipe.as_os_str().as_bytes()).put_number(1).put_long(0);
    let mut open = request(OPEN);
    open.put_string(pipe.as_os_str().as_bytes()).put_number(2).put_number(0);
    let (done, codes) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(talk(&[cut, open]).iter().map(|reply| code(reply)).collect()));
    let codes: Vec<u32> = codes.recv_timeout(std::time::Duration::from_secs(20)).expect("it does not hang");
    assert_eq!(codes, [4, 4]);
}

proptest! {
    #[test]
    fn no_request_makes_it_panic(
        // Nothing that changes files.
        kind in prop::sample::select(vec![CLOSE, READ, LSTAT, FSTAT, READDIR, STAT, READLINK, REALPATH, EXTENDED, 77]),
        rest in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut packet = request(kind);
        packet.extend_from_slice(&rest);
        prop_assert_eq!(talk(&[packet]).len(), 1);
    }
}
