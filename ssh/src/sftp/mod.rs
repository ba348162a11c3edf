//! SFTP, version 3 (draft-ietf-secsh-filexfer-02), which is what OpenSSH, its `scp` and editors speak, with those extensions of
//! OpenSSH that they use.
//!
//! A server runs as the user whose files it carries: what it may do is the kernel's decision. It does one request after the
//! other, so that one buffer is all it needs; names are bytes, as the kernel has them.

mod attributes;
mod files;
mod listing;

use std::io::{self, Read, Write};

use attributes::Attributes;
use files::{Files, Outcome};
use rustix::io::Errno;

use crate::SshError;
use crate::wire::{Put as _, Reader};

/// The longest packet, in bytes, either way: OpenSSH's own bound.
const LONGEST_PACKET: u32 = 256 << 10;
/// The most bytes of a file in one packet.
const LONGEST_DATA: u32 = LONGEST_PACKET - 1024;
/// Files and directories that may be open.
const MOST_HANDLES: u32 = 256;

const INIT: u8 = 1;
const VERSION: u8 = 2;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const LSTAT: u8 = 7;
const FSTAT: u8 = 8;
const SETSTAT: u8 = 9;
const FSETSTAT: u8 = 10;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const MKDIR: u8 = 14;
const RMDIR: u8 = 15;
const REALPATH: u8 = 16;
const STAT: u8 = 17;
const RENAME: u8 = 18;
const READLINK: u8 = 19;
const SYMLINK: u8 = 20;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED: u8 = 200;
const EXTENDED_REPLY: u8 = 201;

/// What a request comes to.
enum Reply {
    Done,
    Handle(u32),
    Data(Vec<u8>),
    Names(Vec<listing::Name>),
    Attributes(Attributes),
    /// Of an extension: its own fields.
    Fields(Vec<u8>),
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The kernel's word.
    #[error(transparent)]
    Kernel(#[from] Errno),
    /// There is no more.
    #[error("end of file")]
    End,
    /// A request that cannot be read.
    #[error("malformed request")]
    Malformed,
    /// A request that is not known.
    #[error("not supported")]
    Unsupported,
}

impl From<SshError> for Failure {
    fn from(_: SshError) -> Self {
        Self::Malformed
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Kernel(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl Failure {
    /// The draft's number for it (§7).
    fn code(&self) -> u32 {
        match self {
            Self::End => 1,
            Self::Kernel(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::BADF) => 2,
            Self::Kernel(Errno::PERM | Errno::ACCESS | Errno::FAULT) => 3,
            Self::Kernel(_) => 4,
            Self::Malformed => 5,
            Self::Unsupported => 8,
        }
    }
}

/// Serves requests until they end.
///
/// # Errors
/// [`SshError::Malformed`] for a packet that is none or too long; [`SshError::Io`] if the streams fail.
pub fn serve(mut requests: impl Read, mut replies: impl Write) -> Result<(), SshError> {
    let mut files = Files::default();
    let mut packet = Vec::new();
    while receive(&mut requests, &mut packet)? {
        let reply = answer(&mut files, &packet)?;
        replies.write_all(&u32::try_from(reply.len()).unwrap_or(u32::MAX).to_be_bytes())?;
        replies.write_all(&reply)?;
        replies.flush()?;
    }
    Ok(())
}

/// Reads a packet into `packet`; false at the end.
fn receive(requests: &mut impl Read, packet: &mut Vec<u8>) -> Result<bool, SshError> {
    let mut head = [0; 4];
    match requests.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        outcome => outcome?,
    }
    let length = u32::from_be_bytes(head);
    if !(1..=LONGEST_PACKET).contains(&length) {
        return Err(SshError::Malformed("packet's length"));
    }
    packet.clear();
    requests.take(length.into()).read_to_end(packet)?;
    if packet.len() < length as usize {
        return Err(SshError::Ended);
    }
    Ok(true)
}

/// The reply to one request.
fn answer(files: &mut Files, packet: &[u8]) -> Result<Vec<u8>, SshError> {
    let mut fields = Reader::new(packet, "request");
    let kind = fields.byte()?;
    if kind == INIT {
        return Ok(version());
    }
    let id = fields.number()?;
    let mut reply = Vec::new();
    let mut begin = |kind: u8| {
        reply.put_byte(kind).put_number(id);
    };
    match perform(files, kind, &mut fields) {
        Ok(Reply::Done) => {
            begin(STATUS);
            reply.put_number(0).put_string("").put_string("");
        }
        Ok(Reply::Handle(handle)) => {
            begin(HANDLE);
            reply.put_string(handle.to_be_bytes());
        }
        Ok(Reply::Data(data)) => {
            begin(DATA);
            reply.put_string(data);
        }
        Ok(Reply::Names(names)) => {
            begin(NAME);
            reply.put_number(u32::try_from(names.len()).unwrap_or(u32::MAX));
            for name in names {
                reply.put_string(&name.name).put_string(&name.line);
                name.attributes.put(&mut reply);
            }
        }
        Ok(Reply::Attributes(attributes)) => {
            begin(ATTRS);
            attributes.put(&mut reply);
        }
        Ok(Reply::Fields(fields)) => {
            begin(EXTENDED_REPLY);
            reply.extend_from_slice(&fields);
        }
        Err(failure) => {
            begin(STATUS);
            reply.put_number(failure.code()).put_string(failure.to_string()).put_string("");
        }
    }
    Ok(reply)
}

fn version() -> Vec<u8> {
    let mut reply = vec![VERSION];
    reply.put_number(3);
    for (name, version) in [
        ("posix-rename@openssh.com", "1"),
        ("statvfs@openssh.com", "2"),
        ("fstatvfs@openssh.com", "2"),
        ("hardlink@openssh.com", "1"),
        ("fsync@openssh.com", "1"),
        ("lsetstat@openssh.com", "1"),
        ("limits@openssh.com", "1"),
        ("expand-path@openssh.com", "1"),
    ] {
        reply.put_string(name).put_string(version);
    }
    reply
}

fn perform(files: &mut Files, kind: u8, fields: &mut Reader<'_>) -> Outcome {
    match kind {
        OPEN => files.open(fields.string()?, fields.number()?, &Attributes::read(fields)?),
        CLOSE => files.close(handle(fields)?),
        READ => files.read(handle(fields)?, fields.long()?, fields.number()?),
        WRITE => files.write(handle(fields)?, fields.long()?, fields.string()?),
        LSTAT => files::status(fields.string()?, false),
        STAT => files::status(fields.string()?, true),
        FSTAT => files.status_of(handle(fields)?),
        SETSTAT => Attributes::read_after(fields)?.apply_to_path(true),
        FSETSTAT => {
            let handle = handle(fields)?;
            Attributes::read(fields)?.apply_to(files.descriptor(handle)?)
        }
        OPENDIR => files.open_directory(fields.string()?),
        READDIR => files.read_directory(handle(fields)?),
        REMOVE => files::remove(fields.string()?, false),
        RMDIR => files::remove(fields.string()?, true),
        MKDIR => files::make_directory(fields.string()?, &Attributes::read(fields)?),
        REALPATH => files::real_path(fields.string()?),
        RENAME => files::rename(fields.string()?, fields.string()?),
        READLINK => files::read_link(fields.string()?),
        // The draft has them the other way round; every server does as OpenSSH's.
        SYMLINK => files::make_link(fields.string()?, fields.string()?),
        EXTENDED => extended(files, fields),
        _ => Err(Failure::Unsupported),
    }
}

fn extended(files: &mut Files, fields: &mut Reader<'_>) -> Outcome {
    match fields.string()? {
        b"posix-rename@openssh.com" => files::replace(fields.string()?, fields.string()?),
        b"hardlink@openssh.com" => files::hard_link(fields.string()?, fields.string()?),
        b"fsync@openssh.com" => files.sync(handle(fields)?),
        b"lsetstat@openssh.com" => Attributes::read_after(fields)?.apply_to_path(false),
        b"statvfs@openssh.com" => files::filesystem(fields.string()?),
        b"fstatvfs@openssh.com" => files.filesystem_of(handle(fields)?),
        b"expand-path@openssh.com" => files::expand(fields.string()?),
        b"limits@openssh.com" => {
            let mut limits = Vec::new();
            limits
                .put_long(LONGEST_PACKET.into())
                .put_long(LONGEST_DATA.into())
                .put_long(LONGEST_DATA.into());
            limits.put_long(MOST_HANDLES.into());
            Ok(Reply::Fields(limits))
        }
        _ => Err(Failure::Unsupported),
    }
}

fn handle(fields: &mut Reader<'_>) -> Result<u32, Failure> {
    let bytes: [u8; 4] = fields.string()?.try_into().map_err(|_| Failure::Malformed)?;
    Ok(u32::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests;
