//! Extended attributes: read through a fid of their own, set when the fid that collected the value goes.
//!
//! Only attributes that mean to the host what they mean to the guest are passed: `user.*`, and, where ids are those of the
//! host, ACLs and capabilities of files. `trusted.*` steers overlays of the host, and the rest of `security.*` its policies:
//! the guest does not see them, and cannot set them.

use std::sync::{Mutex, PoisonError};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::Ownership;
use crate::fid::{Fid, NewAttribute, State};
use crate::node::Node;
use crate::session::Session;
use crate::wire::Reply;

/// The longest value, and the longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const LONGEST: usize = 1 << 16;
/// `XATTR_CREATE` and `XATTR_REPLACE`.
const CREATE: u32 = 1;
const REPLACE: u32 = 2;

impl Session {
    pub(crate) fn xattrwalk(&self, fid: u32, new: u32, name: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        if self.fids.has(new) {
            return Err(Errno::BADF);
        }
        if !name.is_empty() && !self.passes(name) {
            return Err(Errno::NODATA);
        }
        let Node::Host(node) = &*fid.node else { return Err(Errno::NODATA) };
        let path = node.path();
        // Most often there is none, which needs no room to find out.
        let size = if name.is_empty() {
            rustix::fs::listxattr_query(&*path)?
        } else {
            rustix::fs::getxattr_query(&*path, name)?
        };
        let mut attribute = self.attributes.charge(size.min(LONGEST))?;
        let mut value = vec![0; size.min(LONGEST)];
        if size > 0 {
            // `ERANGE` if it has grown meanwhile: the guest asks again.
            let read = if name.is_empty() {
                rustix::fs::listxattr(&*path, &mut value[..])?
            } else {
                rustix::fs::getxattr(&*path, name, &mut value[..])?
            };
            value.truncate(read);
        }
        attribute.value = if name.is_empty() { self.passing(&value) } else { value };
        let length = attribute.value.len() as u64;
        let shown = Fid::new(std::sync::Arc::clone(&fid.node), None, fid.user);
        self.fids.insert(new, shown.opened(State::Attribute(attribute)))?;
        reply.u64(length);
        Ok(())
    }

    pub(crate) fn xattrcreate(&self, fid: u32, name: &[u8], size: u64, flags: u32) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        fid.node.host()?;
        if !self.passes(name) {
            return Err(Errno::OPNOTSUPP);
        }
        if name.len() > 255 {
            return Err(Errno::RANGE);
        }
        if flags & !(CREATE | REPLACE) != 0 {
            return Err(Errno::INVAL);
        }
        let size = usize::try_from(size).ok().filter(|size| *size <= LONGEST).ok_or(Errno::TOOBIG)?;
        let value = self.attributes.charge(size)?;
        let attribute = NewAttribute { name: name.into(), flags, size, value };
        fid.state.set(State::NewAttribute(Mutex::new(attribute))).map_err(|_| Errno::BUSY)
    }

    /// Sets what was collected.
    pub(crate) fn set_attribute(&self, fid: &Fid, attribute: &Mutex<NewAttribute>) -> Result<(), Errno> {
        let attribute = attribute.lock().unwrap_or_else(PoisonError::into_inner);
        let NewAttribute { name, flags, size, value } = &*attribute;
        if value.value.len() != *size {
            return Err(Errno::INVAL);
        }
        let path = fid.node.host()?.path();
        // Linux has no message for removing one: it replaces it by nothing.
        if *size == 0 && *flags == REPLACE {
            return rustix::fs::removexattr(&*path, &**name);
        }
        let flags = XattrFlags::from_bits_retain(*flags);
        rustix::fs::setxattr(&*path, &**name, &value.value, flags)
    }

    fn passes(&self, name: &[u8]) -> bool {
        if name.contains(&0) {
            return false;
        }
        name.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty())
            || self.tree.options.ownership == Ownership::Host
                && matches!(
                    name,
                    b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
                )
    }

    /// What of a list of names, each ended by NUL, the guest may know.
    fn passing(&self, list: &[u8]) -> Vec<u8> {
        let names = list.split_inclusive(|byte| *byte == 0);
        names
            .filter(|name| name.strip_suffix(b"\0").is_some_and(|name| self.passes(name)))
            .flatten()
            .copied()
            .collect()
    }
}
