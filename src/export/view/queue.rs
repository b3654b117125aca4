//! Reads ahead of an image: each is divided into reads of the device.

use std::io;
use std::ops::Range;

use super::image::ImageExport;
use crate::export::read_queue::{PendingRead, ReadQueue};
use crate::qcow2::Content;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// A read of an image that was begun. The ranges of the device in it are not adjacent, so each has a buffer of its own: until
/// it is complete it takes twice the memory.
pub struct ImageRead {
    /// Holds the metadata and the zeros.
    buffer: AlignedBuffer,
    /// The ranges of the buffer that come from the device.
    parts: Vec<(Range<usize>, PendingRead)>,
}

impl ImageRead {
    /// Waits for the bytes.
    ///
    /// # Errors
    /// When they cannot be read, or the device has become shorter.
    pub fn wait(mut self) -> io::Result<AlignedBuffer> {
        for (range, read) in self.parts {
            let read = read.wait()?;
            let part = &mut self.buffer.bytes_mut()[range];
            let bytes = read.bytes().get(..part.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            part.copy_from_slice(bytes);
        }
        Ok(self.buffer)
    }
}

/// A read of an image before it is begun.
enum Planned {
    /// All of it is one range of the device.
    Whole,
    /// The buffer, and the ranges of it that come from the device.
    Parts(AlignedBuffer, Vec<Range<usize>>),
}

impl ImageExport {
    /// Divides a read of the image. The reads of the device that it needs are appended to `reads`.
    fn plan(&self, offset: Bytes, mut buffer: AlignedBuffer, reads: &mut Vec<(Bytes, AlignedBuffer)>) -> Planned {
        let layout = self.layout();
        let size = buffer.bytes().len();
        let mut parts = Vec::new();
        let mut done = 0;
        for part in layout.parts(offset..offset.saturating_add(Bytes::new(size as u64))) {
            let range = done..part.range.end.index_from(offset);
            done = range.end;
            match part.content {
                Content::Device(device) if range.len() == size => {
                    reads.push((device, buffer));
                    return Planned::Whole;
                }
                Content::Device(device) => {
                    let mut own = AlignedBuffer::new();
                    own.resize(range.len());
                    reads.push((device, own));
                    parts.push(range);
                }
                Content::Metadata => layout.fill_metadata(part.range.start, &mut buffer.bytes_mut()[range]),
                Content::Zeros => buffer.bytes_mut()[range].fill(0),
            }
        }
        // Behind the end of the image.
        buffer.bytes_mut()[done..].fill(0);
        Planned::Parts(buffer, parts)
    }

    /// Whether the device can begin such a read: it is aligned to the unit of the device.
    fn can_begin(&self, (offset, buffer): &(Bytes, AlignedBuffer)) -> bool {
        let unit = self.device().align();
        let is_whole = |number: Bytes| number.align_down(unit) == number;
        is_whole(*offset) && is_whole(Bytes::new(buffer.bytes().len() as u64))
    }
}

impl ReadQueue for ImageExport {
    fn longest(&self) -> Bytes {
        self.device().read_queue().map_or(Bytes::ZERO, ReadQueue::longest)
    }

    fn begin(&self, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<PendingRead> {
        let Some(queue) = self.device().read_queue() else { return Vec::new() };
        let mut of_device = Vec::new();
        let mut planned = Vec::with_capacity(reads.len());
        for (offset, buffer) in reads {
            let before = of_device.len();
            let plan = self.plan(offset, buffer, &mut of_device);
            // The end of the device may be no whole unit.
            if !of_device[before..].iter().all(|read| self.can_begin(read)) {
                of_device.truncate(before);
                break;
            }
            planned.push(plan);
        }
        let mut begun = queue.begin(of_device).into_iter();
        let of_image = planned.into_iter().map_while(|plan| match plan {
            Planned::Whole => begun.next(),
            Planned::Parts(buffer, ranges) => {
                let parts = ranges.into_iter().map(|range| Some((range, begun.next()?)));
                Some(PendingRead::Image(ImageRead { buffer, parts: parts.collect::<Option<_>>()? }))
            }
        });
        of_image.collect()
    }

    fn finish(&self) {
        if let Some(queue) = self.device().read_queue() {
            queue.finish();
        }
    }
}
