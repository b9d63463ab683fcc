//! The screen that the firmware left: VGA text, or a framebuffer on which text is drawn.

use crate::DirectMap;
use arch::{HostPhysAddr, PhysMemory};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

const VGA_TEXT: u64 = 0xb8000;
const GREY_ON_BLACK: u8 = 0x07;
const FONT: FontWeight = FontWeight::Regular;
const HEIGHT: RasterHeight = RasterHeight::Size16;
const WIDTH: usize = get_raster_width(FONT, HEIGHT);
const LINES: usize = HEIGHT.val();

const FIRST: u8 = b' ';
const LAST: u8 = b'~';
/// The font's ASCII in four greys, two bits for a pixel: a quarter of what the crate has.
static GLYPHS: [[u16; LINES]; (LAST - FIRST) as usize + 1] = {
    let mut glyphs = [[0; LINES]; (LAST - FIRST) as usize + 1];
    let mut i = 0;
    while i < glyphs.len() {
        let character = (FIRST + i as u8) as char;
        let Some(glyph) = get_raster(character, FONT, HEIGHT) else {
            panic!("the font lacks an ASCII character");
        };
        let mut at = 0;
        while at < LINES * WIDTH {
            let grey = (glyph.pixels()[at] >> 6) as u16;
            glyphs[i][at / WIDTH] |= grey << (2 * (at % WIDTH));
            at += 1;
        }
        i += 1;
    }
    glyphs
};

/// The glyph of a character; `?` stands for what the font lacks.
fn glyph(character: char) -> Option<&'static [u16; LINES]> {
    let index = |byte: u8| usize::from(byte.wrapping_sub(FIRST));
    let found = u8::try_from(character).ok();
    found
        .and_then(|byte| GLYPHS.get(index(byte)))
        .or_else(|| GLYPHS.get(index(b'?')))
}

/// A linear framebuffer in physical memory.
#[derive(Clone, Copy, Debug)]
pub struct Framebuffer {
    /// First byte.
    pub start: HostPhysAddr,
    /// Length in bytes.
    pub bytes: u64,
    /// Visible pixels in a line.
    pub width: usize,
    /// Lines.
    pub height: usize,
    /// Pixels from one line to the next.
    pub stride: usize,
    /// 1 to 4. Text is grey, so the order of the colours does not matter.
    pub bytes_per_pixel: usize,
}

enum Kind {
    Text,
    Pixels(Framebuffer),
}

/// A screen of text. It fills from the top, and begins again at the top when it is full: moving
/// a framebuffer's lines would cost more than the log is worth.
pub struct Screen {
    map: DirectMap,
    kind: Kind,
    columns: usize,
    rows: usize,
    row: usize,
    column: usize,
}

impl Screen {
    /// Takes the VGA text buffer of 80 by 25.
    ///
    /// # Safety
    /// The machine is in VGA text mode and nothing else writes its buffer.
    #[must_use]
    pub const unsafe fn text(map: DirectMap) -> Self {
        Self {
            map,
            kind: Kind::Text,
            columns: 80,
            rows: 25,
            row: 0,
            column: 0,
        }
    }

    /// Takes a framebuffer; `None` when its description contradicts itself or it is not mapped.
    ///
    /// # Safety
    /// The memory is the framebuffer's, and nothing else writes it.
    #[must_use]
    pub unsafe fn pixels(map: DirectMap, frame: Framebuffer) -> Option<Self> {
        let line = frame.stride.checked_mul(frame.bytes_per_pixel)?;
        let needed = u64::try_from(line.checked_mul(frame.height)?).ok()?;
        let columns = frame.width / WIDTH;
        let rows = frame.height / LINES;
        let sane = (1..=4).contains(&frame.bytes_per_pixel)
            && frame.width <= frame.stride
            && needed <= frame.bytes
            && columns > 0
            && rows > 0;
        map.pointer(frame.start, frame.bytes).filter(|_| sane)?;
        Some(Self {
            map,
            kind: Kind::Pixels(frame),
            columns,
            rows,
            row: 0,
            column: 0,
        })
    }

    fn draw(&self, row: usize, column: usize, character: char) {
        match &self.kind {
            Kind::Text => {
                let cell = VGA_TEXT + 2 * (row * self.columns + column) as u64;
                let byte = u8::try_from(character).unwrap_or(b'?');
                self.map
                    .write(HostPhysAddr::new(cell), &[byte, GREY_ON_BLACK]);
            }
            Kind::Pixels(frame) => {
                let Some(glyph) = glyph(character) else {
                    return;
                };
                for (line, pixels) in glyph.iter().enumerate() {
                    let y = row * LINES + line;
                    let x = column * WIDTH;
                    let mut at = frame
                        .start
                        .wrapping_add(((y * frame.stride + x) * frame.bytes_per_pixel) as u64);
                    for i in 0..WIDTH {
                        // 0, 85, 170, 255.
                        let pixel = [(pixels >> (2 * i) & 3) as u8 * 85; 4];
                        if let Some(pixel) = pixel.get(..frame.bytes_per_pixel) {
                            self.map.write(at, pixel);
                        }
                        at = at.wrapping_add(frame.bytes_per_pixel as u64);
                    }
                }
            }
        }
    }

    fn next_line(&mut self) {
        self.column = 0;
        self.row = (self.row + 1) % self.rows;
        for column in 0..self.columns {
            self.draw(self.row, column, ' ');
        }
    }

    /// Writes a line of text and goes to the next.
    pub fn write_line(&mut self, text: &str) {
        for character in text.chars() {
            if self.column == self.columns {
                self.next_line();
            }
            self.draw(self.row, self.column, character);
            self.column += 1;
        }
        self.next_line();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(width: usize, height: usize) -> Framebuffer {
        Framebuffer {
            start: HostPhysAddr::new(0),
            bytes: (width * height * 4) as u64,
            width,
            height,
            stride: width,
            bytes_per_pixel: 4,
        }
    }

    #[test]
    fn text_lands_inside_the_framebuffer_and_wraps() {
        let mut memory = vec![0u8; 64 * 48 * 4];
        // SAFETY: the "physical" range is the vector, which outlives the screen.
        let map = unsafe { DirectMap::new(memory.as_mut_ptr() as u64, memory.len() as u64) };
        // SAFETY: as above.
        let mut screen = unsafe { Screen::pixels(map, frame(64, 48)) }.unwrap();
        for _ in 0..10 {
            screen.write_line("tessera boots");
        }
        assert!(memory.iter().any(|byte| *byte > 100));
    }

    #[test]
    fn a_contradictory_description_is_refused() {
        let mut memory = vec![0u8; 64 * 48 * 4];
        // SAFETY: as above.
        let map = unsafe { DirectMap::new(memory.as_mut_ptr() as u64, memory.len() as u64) };
        let good = frame(64, 48);
        for bad in [
            Framebuffer {
                bytes_per_pixel: 0,
                ..good
            },
            Framebuffer {
                bytes_per_pixel: 9,
                ..good
            },
            Framebuffer {
                stride: usize::MAX,
                ..good
            },
            Framebuffer { width: 65, ..good },
            Framebuffer {
                height: 4800,
                ..good
            },
            Framebuffer {
                bytes: u64::MAX,
                ..good
            },
        ] {
            // SAFETY: nothing is written.
            assert!(unsafe { Screen::pixels(map, bad) }.is_none());
        }
    }
}
