//! Frames: what lies on the byte stream itself.
//!
//! ```text
//! 0        4      5          8
//! +--------+------+----------+---------------------+
//! | length | kind | reserved | payload (length)    |
//! +--------+------+----------+---------------------+
//!   u32 LE   u8     zero
//! ```
//!
//! A reader refuses a frame whose length is above its kind's bound, whose reserved bytes are not zero, or whose kind it
//! does not know, before it reads the payload.

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::LinkError;

/// Bytes before a payload.
pub const HEADER: usize = 8;
/// The longest payload of a [`Kind::Data`] frame, in bytes. Larger ones would let bulk delay what is urgent; smaller ones
/// cost a virtqueue notification each.
pub const MAX_DATA: usize = 64 << 10;
/// The longest payload of every other frame, in bytes.
pub const MAX_CONTROL: usize = 4 << 10;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of the multiplexer. Either way.
    Data = 0,
    /// Host to guest: send nothing more, and say that you do.
    Park = 1,
    /// Guest to host: nothing follows until you speak. Payload: [`Hello`](crate::message::Hello).
    Parked = 2,
    /// Host to guest: go on as before.
    Continue = 3,
    /// Host to guest: this is a new life; forget the multiplexer and every stream.
    Begin = 4,
    /// Guest to host: the new multiplexer starts after this frame.
    Begun = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Data, Self::Park, Self::Parked, Self::Continue, Self::Begin, Self::Begun]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    fn most(self) -> usize {
        if self == Self::Data { MAX_DATA } else { MAX_CONTROL }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// Reads one frame; `None` at the end of the stream between two frames. Not to be cancelled: what was read would be lost.
///
/// # Errors
/// [`LinkError::TooLong`], [`LinkError::Unexpected`] for what is no frame, [`LinkError::Io`] for a stream that breaks in one.
pub async fn read<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Option<Frame>, LinkError> {
    let mut header = [0; HEADER];
    let first = reader.read(&mut header).await?;
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut header[first..]).await?;
    let (kind, length) = parse_header(header)?;
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).await?;
    Ok(Some(Frame { kind, payload }))
}

fn parse_header(header: [u8; HEADER]) -> Result<(Kind, usize), LinkError> {
    let [a, b, c, d, kind, reserved @ ..] = header;
    let length = u32::from_le_bytes([a, b, c, d]);
    let Some(kind) = Kind::from_byte(kind).filter(|_| reserved == [0; 3]) else {
        return Err(LinkError::Unexpected {
            got: format!("a frame of kind {kind} ({header:?})"),
            expected: "a frame of this protocol",
        });
    };
    let most = kind.most();
    if length as usize > most {
        return Err(LinkError::TooLong { what: "a frame", length: length.into(), most: most as u64 });
    }
    Ok((kind, length as usize))
}

/// Writes one frame and flushes it. `payload` must be within its kind's bound.
///
/// # Errors
/// Those of the stream.
pub async fn write<W: AsyncWrite + Unpin>(
    writer: &mut W,
    kind: Kind,
    payload: &[u8],
) -> Result<(), LinkError> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.resize(HEADER, 0);
    bytes.extend_from_slice(payload);
    write_in_place(writer, kind, &mut bytes).await
}

/// Writes the frame whose payload lies in `buffer` from [`HEADER`] on; the header is filled in. Saves copying bulk.
///
/// # Errors
/// Those of the stream; [`LinkError::TooLong`] for a payload above the kind's bound.
pub async fn write_in_place<W: AsyncWrite + Unpin>(
    writer: &mut W,
    kind: Kind,
    buffer: &mut [u8],
) -> Result<(), LinkError> {
    let length = buffer.len().saturating_sub(HEADER);
    let most = kind.most();
    if length > most {
        return Err(LinkError::TooLong { what: "a frame", length: length as u64, most: most as u64 });
    }
    // Within the bound, so it fits.
    buffer[..4].copy_from_slice(&(length as u32).to_le_bytes());
    buffer[4..HEADER].copy_from_slice(&[kind as u8, 0, 0, 0]);
    writer.write_all(buffer).await?;
    writer.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn a_frame_reads_back_and_the_layout_is_frozen() {
        block_on(async {
            let mut bytes = Vec::new();
            write(&mut bytes, Kind::Parked, b"hello").await.unwrap();
            assert_eq!(bytes, b"\x05\0\0\0\x02\0\0\0hello");
            let mut reader = bytes.as_slice();
            let frame = read(&mut reader).await.unwrap().unwrap();
            assert_eq!(frame, Frame { kind: Kind::Parked, payload: b"hello".to_vec() });
            assert_eq!(read(&mut reader).await.unwrap(), None);
        });
    }

    #[test]
    fn what_is_no_frame_is_refused_before_its_payload_is_read() {
        let table: [(&[u8], &str); 6] = [
            (b"\xff\xff\xff\xff\0\0\0\0", "announced 4294967295 bytes"),
            (b"\x01\0\x01\0\0\0\0\0", "announced 65537 bytes"),
            (b"\x01\x10\0\0\x02\0\0\0", "announced 4097 bytes"),
            (b"\0\0\0\0\x09\0\0\0", "kind 9"),
            (b"\0\0\0\0\0\0\0\x01", "where a frame of this protocol was due"),
            (b"\x05\0\0\0\0\0\0\0abc", "link broke"),
        ];
        for (bytes, words) in table {
            let error = block_on(read(&mut { bytes })).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn nothing_too_long_is_written() {
        let error = block_on(write(&mut Vec::new(), Kind::Data, &vec![0; MAX_DATA + 1])).unwrap_err();
        assert!(matches!(error, LinkError::TooLong { .. }), "{error}");
    }
}
