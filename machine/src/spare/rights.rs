//! An [`Offer`] with a machine's descriptors, in one message over a Unix socket (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use kiln_contract::VmHandle;
use kiln_link::message;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::Offer;

/// The longest offer, in bytes: a path and two numbers.
const LONGEST: usize = 8 << 10;

/// Of a message to nobody: an error, and no signal.
#[cfg(target_os = "linux")]
const TO_SEND: SendFlags = SendFlags::NOSIGNAL;
#[cfg(not(target_os = "linux"))]
const TO_SEND: SendFlags = SendFlags::empty();
/// No program that is executed meanwhile inherits what comes, where that can be said at once.
#[cfg(target_os = "linux")]
const TO_RECEIVE: RecvFlags = RecvFlags::CMSG_CLOEXEC;
#[cfg(not(target_os = "linux"))]
const TO_RECEIVE: RecvFlags = RecvFlags::empty();

/// Sends it.
pub(super) fn send(socket: &UnixStream, offer: &Offer, descriptors: &[OwnedFd]) -> io::Result<()> {
    let bytes = message::encode(offer);
    let borrowed: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(VmHandle::DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if bytes.len() > LONGEST || !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("the offer is too long"));
    }
    let sent = sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, TO_SEND)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives it.
pub(super) fn receive(socket: &UnixStream) -> io::Result<(Offer, Vec<OwnedFd>)> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(VmHandle::DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, TO_RECEIVE)
    })?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    for descriptor in &descriptors {
        fcntl_setfd(descriptor, FdFlags::CLOEXEC)?;
    }
    let offer = bytes.get(..received.bytes).unwrap_or_default();
    let offer = message::decode(offer).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((offer, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn an_offer_arrives_with_its_descriptors_and_nonsense_does_not() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let offer = Offer { pid: 7, memory_address: 1 << 40, directory: "/t/spare.x".to_owned() };
        let (mut reader, writer) = io::pipe().unwrap();
        let mut descriptors = vec![OwnedFd::from(writer)];
        while descriptors.len() < VmHandle::DESCRIPTORS {
            descriptors.push(descriptors[0].try_clone().unwrap());
        }
        send(&ours, &offer, &descriptors).unwrap();
        drop(descriptors);
        let (received, mut descriptors) = receive(&theirs).unwrap();
        assert_eq!((received, descriptors.len()), (offer, VmHandle::DESCRIPTORS));
        io::PipeWriter::from(descriptors.remove(0)).write_all(b"through").unwrap();
        drop(descriptors);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");

        (&ours).write_all(b"no offer").unwrap();
        assert_eq!(receive(&theirs).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(ours);
        assert!(receive(&theirs).is_err(), "nobody is there");
    }
}
