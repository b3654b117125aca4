//! The commands that a disk is asked, one at a time.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::pages::{self, LbaStatus};
use crate::error::{Error, Result};
use crate::sys::sg::{self, Transfer};
use crate::units::Bytes;

/// The time a command may take: what the kernel's disk driver gives its own (`SD_TIMEOUT` of `drivers/scsi/sd.h`).
/// Less would have a slow array's commands aborted and the device reset under whoever else uses it.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a command is sent again because the device reports an event instead.
const ATTEMPTS: u32 = 4;
/// Room for vital product data and standard INQUIRY data: what any device may be asked for.
const INQUIRY_LEN: usize = 252;
/// READ CAPACITY(16) data.
const CAPACITY_LEN: usize = 32;
/// A GET LBA STATUS answer of 255 descriptors. Devices may return fewer, and many return one.
const STATUS_LEN: usize = 8 + 255 * 16;

/// INQUIRY of SPC-4.
const INQUIRY: u8 = 0x12;
/// SERVICE ACTION IN(16) of SBC-3; with these actions it is READ CAPACITY(16) and GET LBA STATUS.
const SERVICE_ACTION_IN_16: u8 = 0x9e;
const READ_CAPACITY_16: u8 = 0x10;
const GET_LBA_STATUS: u8 = 0x12;

/// SCSI status GOOD.
const GOOD: u8 = 0;

type Send = dyn Fn(&[u8], &mut [u8]) -> io::Result<Transfer> + std::marker::Send + Sync;

/// A SCSI logical unit that answers commands.
pub(super) struct Target {
    send: Box<Send>,
}

/// How a command failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The device reports an event: what it said before may no longer hold.
    Attention,
    /// It does not know the command, or could not do it.
    Failed(Error),
}

impl Target {
    /// The disk behind an open descriptor of the whole disk.
    pub(super) fn disk(file: Arc<impl AsFd + std::marker::Send + Sync + 'static>) -> Self {
        Self::new(move |cdb, data| sg::command(file.as_fd(), cdb, data, TIMEOUT))
    }

    /// Whatever answers `send`.
    pub(super) fn new(
        send: impl Fn(&[u8], &mut [u8]) -> io::Result<Transfer> + std::marker::Send + Sync + 'static,
    ) -> Self {
        Self { send: Box::new(send) }
    }

    /// Whether the disk promises, now, that blocks without an allocation read as zeros.
    ///
    /// # Errors
    ///
    /// The reason why its holes cannot be used.
    pub(super) fn promise(&self, len: Bytes, block: Bytes) -> Result<()> {
        let identity = pages::identity(&self.inquiry(None)?)?;
        if !identity.disk {
            return Err(Error::failed("not a direct-access SCSI disk"));
        }
        if identity.ata {
            return Err(Error::failed(
                "an ATA disk cannot be asked which blocks are trimmed (ATA has no command like GET LBA STATUS)",
            ));
        }
        self.zeros(len, block)?;
        let supported = self.inquiry(Some(pages::SUPPORTED_PAGES))?;
        if pages::lists_page(&supported, pages::PROVISIONING_PAGE)?
            && !pages::provisioning_zeros(&self.inquiry(Some(pages::PROVISIONING_PAGE))?)?
        {
            return Err(Error::failed("the disk does not promise zeros in unmapped blocks (LBPRZ of VPD page B2h)"));
        }
        Ok(())
    }

    /// Whether READ CAPACITY(16) promises so, and has the length and blocks that the kernel has.
    ///
    /// # Errors
    ///
    /// The reason why its holes cannot be used.
    pub(super) fn zeros(&self, len: Bytes, block: Bytes) -> Result<()> {
        let capacity = pages::capacity(&self.again("READ CAPACITY(16)", &read_capacity_cdb(), CAPACITY_LEN)?)?;
        if capacity.len != len || capacity.block != block {
            return Err(Error::failed(format!(
                "the disk says {} bytes in blocks of {}, the kernel {len} in blocks of {block}",
                capacity.len, capacity.block
            )));
        }
        if !capacity.provisioning {
            return Err(Error::failed("the disk is fully provisioned (LBPME is 0 in READ CAPACITY(16))"));
        }
        if !capacity.zeros {
            return Err(Error::failed(
                "the disk does not promise zeros in unmapped blocks (LBPRZ is 0 in READ CAPACITY(16))",
            ));
        }
        Ok(())
    }

    /// The status of the blocks from `asked` on, a multiple of `block`.
    ///
    /// # Errors
    ///
    /// [`Failure::Attention`] when the device's promise must be asked again before its holes are believed.
    pub(super) fn status(&self, asked: Bytes, block: Bytes, len: Bytes) -> std::result::Result<LbaStatus, Failure> {
        let lba = asked.get().checked_div(block.get()).unwrap_or(0);
        let data = self.once("GET LBA STATUS", &lba_status_cdb(lba), STATUS_LEN)?;
        Ok(pages::lba_status(&data, asked, block, len))
    }

    fn inquiry(&self, page: Option<u8>) -> Result<Vec<u8>> {
        let what = match page {
            None => "INQUIRY".to_owned(),
            Some(page) => format!("INQUIRY of VPD page {page:02X}h"),
        };
        self.again(&what, &inquiry_cdb(page), INQUIRY_LEN)
    }

    /// Sends a command again as long as the device reports events instead.
    fn again(&self, what: &str, cdb: &[u8], room: usize) -> Result<Vec<u8>> {
        for _ in 0..ATTEMPTS {
            match self.once(what, cdb, room) {
                Err(Failure::Attention) => {}
                Err(Failure::Failed(error)) => return Err(error),
                Ok(data) => return Ok(data),
            }
        }
        Err(Error::failed(format!("{what} keeps being answered with UNIT ATTENTION")))
    }

    fn once(&self, what: &str, cdb: &[u8], room: usize) -> std::result::Result<Vec<u8>, Failure> {
        let failed = |error: Error| Failure::Failed(error);
        let mut data = vec![0; room];
        let transfer = (self.send)(cdb, &mut data)
            .map_err(|source| failed(Error::failed(format!("cannot send {what}")).because(source)))?;
        if transfer.status != GOOD {
            let sense = pages::sense(&transfer.sense);
            return Err(match sense {
                Some(sense) if sense.is_attention() => Failure::Attention,
                Some(sense) if sense.is_refusal() => failed(Error::failed(format!("the disk does not support {what}"))),
                Some(sense) => failed(Error::failed(format!(
                    "{what} failed with sense key {:X}h, code {:02X}h/{:02X}h",
                    sense.key, sense.code.0, sense.code.1
                ))),
                None => failed(Error::failed(format!("{what} failed with SCSI status {:02X}h", transfer.status))),
            });
        }
        data.truncate(transfer.len);
        Ok(data)
    }
}

fn inquiry_cdb(page: Option<u8>) -> [u8; 6] {
    [INQUIRY, u8::from(page.is_some()), page.unwrap_or(0), 0, INQUIRY_LEN as u8, 0]
}

fn read_capacity_cdb() -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[SERVICE_ACTION_IN_16, READ_CAPACITY_16]);
    cdb[10..14].copy_from_slice(&(CAPACITY_LEN as u32).to_be_bytes());
    cdb
}

/// Report type 0: all blocks, whatever their status.
fn lba_status_cdb(lba: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[SERVICE_ACTION_IN_16, GET_LBA_STATUS]);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(STATUS_LEN as u32).to_be_bytes());
    cdb
}
