//! The SCSI commands that a disk receives, and what becomes of each.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::pages::{self, LbaStatus};
use crate::error::{Error, Result};
use crate::sys::sg::{self, Transfer};
use crate::units::Bytes;

/// The time that a command may take: that of the kernel's disk driver (`SD_TIMEOUT` of `drivers/scsi/sd.h`). With less,
/// the kernel would abort the commands of a slow array and reset the device under its other users.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a command is sent again because the device reports UNIT ATTENTION instead.
const ATTEMPTS: u32 = 4;
/// Room for vital product data and standard INQUIRY data: a length that every device accepts.
const INQUIRY_LEN: usize = 252;
/// The length of READ CAPACITY(16) data.
const CAPACITY_LEN: usize = 32;
/// Room for a GET LBA STATUS answer of 255 descriptors. Devices may return fewer, and many return one.
const STATUS_LEN: usize = 8 + 255 * 16;

/// INQUIRY of SPC-4.
const INQUIRY: u8 = 0x12;
/// SERVICE ACTION IN(16) of SBC-3; with these actions it is READ CAPACITY(16) and GET LBA STATUS.
const SERVICE_ACTION_IN_16: u8 = 0x9e;
const READ_CAPACITY_16: u8 = 0x10;
const GET_LBA_STATUS: u8 = 0x12;

/// SCSI status GOOD.
const GOOD: u8 = 0;

/// Sends a command descriptor block, and fills a buffer with the data that the device returns.
type SendCommand = dyn Fn(&[u8], &mut [u8]) -> io::Result<Transfer> + Send + Sync;

/// A SCSI logical unit.
pub(super) struct ScsiDevice {
    send: Box<SendCommand>,
}

/// How a command failed.
#[derive(Debug)]
pub(super) enum ScsiFailure {
    /// The device reports UNIT ATTENTION: its parameters may have changed.
    UnitAttention,
    /// The device does not support the command, or could not execute it.
    Failed(Error),
}

impl ScsiDevice {
    /// The disk with this open descriptor, of the whole disk.
    pub(super) fn disk(file: Arc<impl AsFd + Send + Sync + 'static>) -> Self {
        Self::new(move |cdb, data| sg::command(file.as_fd(), cdb, data, TIMEOUT))
    }

    /// A device that receives its commands through `send`.
    pub(super) fn new(send: impl Fn(&[u8], &mut [u8]) -> io::Result<Transfer> + Send + Sync + 'static) -> Self {
        Self { send: Box::new(send) }
    }

    /// Checks that the disk reports, now, that blocks without storage read as zeros.
    ///
    /// # Errors
    ///
    /// The reason why its holes cannot be used.
    pub(super) fn check_zeros(&self, len: Bytes, block: Bytes) -> Result<()> {
        let inquiry = pages::inquiry(&self.inquiry(None)?)?;
        if !inquiry.disk {
            return Err(Error::failed("not a direct-access SCSI disk"));
        }
        if inquiry.ata {
            return Err(Error::failed(
                "an ATA disk cannot report which blocks are trimmed (ATA has no command like GET LBA STATUS)",
            ));
        }
        self.check_capacity(len, block)?;
        let supported = self.inquiry(Some(pages::SUPPORTED_PAGES))?;
        if pages::lists_page(&supported, pages::PROVISIONING_PAGE)?
            && !pages::provisioning_zeros(&self.inquiry(Some(pages::PROVISIONING_PAGE))?)?
        {
            return Err(Error::failed("the disk does not promise zeros in unmapped blocks (LBPRZ of VPD page B2h)"));
        }
        Ok(())
    }

    /// Checks that READ CAPACITY(16) reports zeros for blocks without storage, and the length and block size that the
    /// kernel has.
    ///
    /// # Errors
    ///
    /// The reason why its holes cannot be used.
    pub(super) fn check_capacity(&self, len: Bytes, block: Bytes) -> Result<()> {
        let capacity = pages::capacity(&self.repeat("READ CAPACITY(16)", &read_capacity_cdb(), CAPACITY_LEN)?)?;
        if capacity.len != len || capacity.block != block {
            return Err(Error::failed(format!(
                "the disk reports {} bytes in blocks of {}, the kernel {len} in blocks of {block}",
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

    /// The status of the blocks from `start` on, a multiple of `block`.
    ///
    /// # Errors
    ///
    /// [`ScsiFailure::UnitAttention`] when [`ScsiDevice::check_zeros`] is due before holes are used.
    pub(super) fn lba_status(
        &self,
        start: Bytes,
        block: Bytes,
        len: Bytes,
    ) -> std::result::Result<LbaStatus, ScsiFailure> {
        let lba = start.get().checked_div(block.get()).unwrap_or(0);
        let data = self.once("GET LBA STATUS", &lba_status_cdb(lba), STATUS_LEN)?;
        Ok(pages::lba_status(&data, start, block, len))
    }

    fn inquiry(&self, page: Option<u8>) -> Result<Vec<u8>> {
        let what = match page {
            None => "INQUIRY".to_owned(),
            Some(page) => format!("INQUIRY of VPD page {page:02X}h"),
        };
        self.repeat(&what, &inquiry_cdb(page), INQUIRY_LEN)
    }

    /// Sends a command, again after each UNIT ATTENTION.
    fn repeat(&self, what: &str, cdb: &[u8], room: usize) -> Result<Vec<u8>> {
        for _ in 0..ATTEMPTS {
            match self.once(what, cdb, room) {
                Err(ScsiFailure::UnitAttention) => {}
                Err(ScsiFailure::Failed(error)) => return Err(error),
                Ok(data) => return Ok(data),
            }
        }
        Err(Error::failed(format!("the disk answers {what} with UNIT ATTENTION again and again")))
    }

    /// Sends a command once.
    fn once(&self, what: &str, cdb: &[u8], room: usize) -> std::result::Result<Vec<u8>, ScsiFailure> {
        let failed = |error: Error| ScsiFailure::Failed(error);
        let mut data = vec![0; room];
        let transfer = (self.send)(cdb, &mut data)
            .map_err(|source| failed(Error::failed(format!("cannot send {what}")).because(source)))?;
        if transfer.status != GOOD {
            let sense = pages::sense(&transfer.sense);
            return Err(match sense {
                Some(sense) if sense.is_unit_attention() => ScsiFailure::UnitAttention,
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

/// Report type 0: blocks of every status.
fn lba_status_cdb(lba: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[SERVICE_ACTION_IN_16, GET_LBA_STATUS]);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(STATUS_LEN as u32).to_be_bytes());
    cdb
}
