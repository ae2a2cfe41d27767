//! Line charts: where each line, dot, tick and tooltip of a drawing lies. `parts.html` writes them as SVG; the page
//! defines the colours: a line of style 0 has the class `line-0`, and so on.

use std::borrow::Cow;

use serde::Serialize;

/// Size of the drawing in its own units, as in `parts.html`; the page scales it.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 38.0;

/// More points than this are averaged in runs: a chart is some 500 pixels wide.
const MAX_POINTS: usize = 300;
/// Most strips that show a step's values under the pointer.
const MAX_STRIPS: usize = 100;
/// Lines of more points than this get a smoothed line in front of a faint raw one.
const SMOOTH_FROM: usize = 30;

/// A named line over steps.
#[derive(Clone, Debug)]
pub struct Line {
    /// The name in the legend.
    pub name: Cow<'static, str>,
    /// Values by step, in order of the steps.
    pub points: Vec<(f64, f64)>,
    /// Number of its colour and dashes on the page.
    pub style: usize,
    /// How the points are drawn.
    pub kind: LineKind,
}

/// How the points of a line are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineKind {
    /// Differs from step to step by chance: a long one is drawn faint, with a smoothed one in front.
    Noisy,
    /// The value at each step is exact.
    Exact,
    /// A few dots: evaluations.
    Dots,
}

/// A chart: lines over the steps of a run.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What stands above it.
    pub title: &'static str,
    /// What is shown, in a sentence.
    pub about: &'static str,
    /// Its lines, in the order of the legend.
    pub lines: Vec<Line>,
    /// Whether the values are shares, whose axis goes from 0 to 1 whatever they are.
    pub share: bool,
}

/// A chart as the template writes it: places in the drawing's units, as text.
#[derive(Clone, Debug, Serialize)]
pub struct Drawing {
    title: &'static str,
    about: &'static str,
    /// The chart in words, for those who cannot see it.
    spoken: String,
    legend: Vec<LegendEntry>,
    value_ticks: Vec<Tick>,
    step_ticks: Vec<Tick>,
    paths: Vec<Path>,
    dots: Vec<Dot>,
    strips: Vec<Strip>,
}

#[derive(Clone, Debug, Serialize)]
struct LegendEntry {
    name: String,
    style: usize,
    /// `dots` or `stroke`.
    shape: &'static str,
}

#[derive(Clone, Debug, Serialize)]
struct Tick {
    at: String,
    label: String,
}

#[derive(Clone, Debug, Serialize)]
struct Path {
    style: usize,
    /// Drawn faint, under what matters more.
    is_raw: bool,
    /// `x,y x,y ...`
    points: String,
}

#[derive(Clone, Debug, Serialize)]
struct Dot {
    style: usize,
    x: String,
    y: String,
}

/// An invisible strip whose tooltip says the values at a step.
#[derive(Clone, Debug, Serialize)]
struct Strip {
    x: String,
    width: String,
    text: String,
}

impl Chart {
    /// A chart of the lines that have something to show; `None` where none has.
    pub fn of(title: &'static str, about: &'static str, share: bool, lines: Vec<Line>) -> Option<Chart> {
        let lines: Vec<Line> = lines.into_iter().filter(|line| !line.points.is_empty()).collect();
        if lines.is_empty() { None } else { Some(Chart { title, about, lines, share }) }
    }

    /// The chart, laid out.
    pub fn drawing(&self) -> Drawing {
        let scale = Scale::of(self);
        let entry = |line: &Line| LegendEntry {
            name: line.name.to_string(),
            style: line.style,
            shape: if line.kind == LineKind::Dots { "dots" } else { "stroke" },
        };
        let mut drawing = Drawing {
            title: self.title,
            about: self.about,
            spoken: self.spoken(),
            legend: self.lines.iter().map(entry).collect(),
            value_ticks: scale.value_ticks(),
            step_ticks: scale.step_ticks(),
            paths: Vec::new(),
            dots: Vec::new(),
            strips: self.strips(&scale),
        };
        self.lines.iter().for_each(|line| draw(&mut drawing, line, &scale));
        drawing
    }

    /// The chart in words.
    fn spoken(&self) -> String {
        let line = |line: &Line| match (line.points.first(), line.points.last()) {
            (Some(first), Some(last)) => format!(
                "{} from {} at step {} to {} at step {}",
                line.name,
                number(first.1),
                first.0,
                number(last.1),
                last.0
            ),
            _ => line.name.to_string(),
        };
        let lines: Vec<String> = self.lines.iter().map(line).collect();
        format!("{}: {}.", self.title, lines.join("; "))
    }

    /// Strips over the whole width, each with the values of all lines at or near its step.
    fn strips(&self, scale: &Scale) -> Vec<Strip> {
        let longest = self.lines.iter().map(|line| line.points.as_slice()).max_by_key(|points| points.len());
        let steps: Vec<f64> =
            average(longest.unwrap_or_default(), MAX_STRIPS).iter().map(|point| point.0).collect();
        let middle = |a: f64, b: f64| 0.5 * (scale.x(a) + scale.x(b));
        let strip = |(index, &step): (usize, &f64)| {
            let from = if index == 0 { LEFT } else { middle(steps[index - 1], step) };
            let to = steps.get(index + 1).map_or(WIDTH - RIGHT, |&next| middle(step, next));
            let values: String = self.lines.iter().map(|line| line.value_near(step)).collect();
            Strip {
                x: place(from),
                width: place((to - from).max(0.0)),
                text: format!("step {}{values}", step.round()),
            }
        };
        steps.iter().enumerate().map(strip).collect()
    }
}

impl Line {
    /// A line of a tooltip: the value at `step`, or the nearest one with the step that it belongs to.
    fn value_near(&self, step: f64) -> String {
        let near = |point: &&(f64, f64)| (point.0 - step).abs();
        let Some(point) = self.points.iter().min_by(|a, b| near(a).total_cmp(&near(b))) else {
            return String::new();
        };
        let of_step = if near(&point) < 1.0 { String::new() } else { format!(" (step {})", point.0) };
        format!("\n{} {}{of_step}", self.name, number(point.1))
    }
}

fn draw(drawing: &mut Drawing, line: &Line, scale: &Scale) {
    let points = average(&line.points, MAX_POINTS);
    let is_dotted = line.kind == LineKind::Dots || points.len() == 1;
    let is_smoothed = !is_dotted && line.kind == LineKind::Noisy && points.len() > SMOOTH_FROM;
    let path = |points: &[(f64, f64)], is_raw| {
        let points =
            points.iter().map(|point| format!("{},{}", place(scale.x(point.0)), place(scale.y(point.1))));
        Path { style: line.style, is_raw, points: points.collect::<Vec<_>>().join(" ") }
    };
    drawing.paths.push(path(&points, is_dotted || is_smoothed));
    if is_smoothed {
        drawing.paths.push(path(&smooth(&points), false));
    }
    if is_dotted {
        let dot = |point: &(f64, f64)| Dot {
            style: line.style,
            x: place(scale.x(point.0)),
            y: place(scale.y(point.1)),
        };
        drawing.dots.extend(points.iter().map(dot));
    }
}

/// A place on the drawing, to a tenth of a unit.
fn place(at: f64) -> String {
    format!("{at:.1}")
}

/// Means of runs of neighbours, at most `most` of them.
fn average(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let run = points.len().div_ceil(most).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        let sum = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(run).map(mean).collect()
}

/// The values at each point of straight lines that are fitted to a window around it, about a twelfth of the line wide. In
/// the middle this is the mean. Towards the ends the window stays as wide and lies to one side, so that the last value is
/// not a single step's; the fit keeps it from lagging.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 24).max(2);
    let width = (2 * reach + 1).min(points.len());
    let smoothed = |(index, &(step, _)): (usize, &(f64, f64))| {
        let start = index.saturating_sub(reach).min(points.len() - width);
        (step, fitted(&points[start..start + width], step))
    };
    points.iter().enumerate().map(smoothed).collect()
}

/// The value at `step` of the line with the least squares to `window`, within the values that are there.
fn fitted(window: &[(f64, f64)], step: f64) -> f64 {
    let count = window.len() as f64;
    let mean = |of: &dyn Fn(&(f64, f64)) -> f64| window.iter().map(of).sum::<f64>() / count;
    let (middle, level) = (mean(&|point| point.0), mean(&|point| point.1));
    let spread = mean(&|point| (point.0 - middle).powi(2));
    let slope = match spread > 0.0 {
        true => mean(&|point| (point.0 - middle) * (point.1 - level)) / spread,
        false => 0.0,
    };
    let least = window.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let most = window.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    (level + slope * (step - middle)).max(least).min(most)
}

/// Maps values to places on the drawing.
struct Scale {
    first_step: f64,
    last_step: f64,
    step_ticks: Vec<f64>,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Scale {
    fn of(chart: &Chart) -> Scale {
        let points = || chart.lines.iter().flat_map(|line| &line.points);
        let low = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        let high = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
        let first_step = low(&mut points().map(|point| point.0));
        let last_step = high(&mut points().map(|point| point.0));
        let (bottom, top) = if chart.share {
            (0.0, 1.0)
        } else {
            (low(&mut points().map(|point| point.1)), high(&mut points().map(|point| point.1)))
        };
        let ticks = round_ticks(bottom, top, 5.0);
        let whole = |tick: &f64| tick.fract() == 0.0;
        Scale {
            first_step,
            last_step,
            step_ticks: round_ticks(first_step, last_step, 6.0)
                .into_iter()
                .filter(|tick| whole(tick) && (first_step..=last_step).contains(tick))
                .collect(),
            low: ticks.first().map_or(bottom, |tick| tick.min(bottom)),
            high: ticks.last().map_or(top, |tick| tick.max(top)),
            ticks,
        }
    }

    fn x(&self, step: f64) -> f64 {
        let width = WIDTH - LEFT - RIGHT;
        let span = self.last_step - self.first_step;
        if span > 0.0 { LEFT + width * (step - self.first_step) / span } else { LEFT + 0.5 * width }
    }

    fn y(&self, value: f64) -> f64 {
        let height = HEIGHT - TOP - BOTTOM;
        TOP + height * (self.high - value) / (self.high - self.low)
    }

    fn value_ticks(&self) -> Vec<Tick> {
        let tick = |(&value, label)| Tick { at: place(self.y(value)), label };
        self.ticks.iter().zip(tick_labels(&self.ticks)).map(tick).collect()
    }

    fn step_ticks(&self) -> Vec<Tick> {
        let tick = |&step: &f64| Tick { at: place(self.x(step)), label: step.to_string() };
        self.step_ticks.iter().map(tick).collect()
    }
}

/// Labels of values at equal distances. Where four digits are too few to tell them apart, each has the digits that the
/// distance has.
fn tick_labels(ticks: &[f64]) -> Vec<String> {
    let short: Vec<String> = ticks.iter().map(|&tick| number(tick)).collect();
    if short.windows(2).all(|pair| pair[0] != pair[1]) {
        return short;
    }
    let distance = ticks.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::INFINITY, f64::min);
    // A distance is 1, 2 or 5 times a power of ten, but for rounding.
    let digits = (-(distance * 1.01).log10().floor()).max(0.0) as usize;
    // Longer ones would not fit beside the drawing.
    if digits > 8 { short } else { ticks.iter().map(|tick| format!("{tick:.digits$}")).collect() }
}

/// Multiples of 1, 2 or 5 times a power of ten that enclose `low..=high`, about `count` of them.
fn round_ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let (low, high) = if high > low { (low, high) } else { (low - margin(low), low + margin(low)) };
    let rough = (high - low) / count;
    let power = 10f64.powf(rough.log10().floor());
    let factor = match rough / power {
        factor if factor <= 1.0 => 1.0,
        factor if factor <= 2.0 => 2.0,
        factor if factor <= 5.0 => 5.0,
        _ => 10.0,
    };
    let step = factor * power;
    let first = (low / step).floor() as i64;
    let last = (high / step).ceil() as i64;
    (first..=last).map(|index| index as f64 * step).collect()
}

/// Space above and below a line that does not move.
fn margin(value: f64) -> f64 {
    if value == 0.0 { 1.0 } else { 0.1 * value.abs() }
}

/// A value in four digits at most.
pub fn number(value: f64) -> String {
    let size = value.abs();
    let plain = |text: String| {
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
    };
    if size != 0.0 && !(1e-3..1e6).contains(&size) {
        let text = format!("{value:.2e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        format!("{}e{exponent}", plain(mantissa.to_string()))
    } else if size >= 1000.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        plain(format!("{value:.1}"))
    } else {
        plain(format!("{value:.3}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        Chart::of(
            "Loss",
            "The loss.",
            false,
            vec![Line { name: "train".into(), points, style: 0, kind: LineKind::Noisy }],
        )
        .unwrap()
    }

    #[test]
    fn ticks_are_round_and_enclose() {
        assert_eq!(round_ticks(0.0, 1.0, 5.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(round_ticks(-130.0, 37.0, 5.0), [-150.0, -100.0, -50.0, 0.0, 50.0]);
        for (low, high) in [(3.0, 3.0), (0.0, 0.0), (-1e-9, 1e-9), (1e20, 1.1e20)] {
            let ticks = round_ticks(low, high, 5.0);
            assert!(ticks.len() >= 2 && ticks.len() <= 12, "{low} {high}: {ticks:?}");
            assert!(ticks[0] <= low && ticks[ticks.len() - 1] >= high, "{low} {high}: {ticks:?}");
        }
    }

    #[test]
    fn ticks_that_lie_close_have_different_labels() {
        for (low, high, labels) in [
            (0.6922, 0.6938, vec!["0.6920", "0.6925", "0.6930", "0.6935", "0.6940"]),
            (1234.2, 1234.8, vec!["1234.2", "1234.4", "1234.6", "1234.8"]),
            (0.00682, 0.00758, vec!["0.0068", "0.0070", "0.0072", "0.0074", "0.0076"]),
            (0.0, 1.0, vec!["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ] {
            assert_eq!(tick_labels(&round_ticks(low, high, 5.0)), labels, "{low} {high}");
        }
        for (low, high) in [(1e20, 1.1e20), (1e-9, 1.00001e-9), (-1e-9, 1e-9), (5e5, 5e5 + 1e-3)] {
            let labels = tick_labels(&round_ticks(low, high, 5.0));
            assert!(labels.iter().all(|label| label.len() <= 12), "{labels:?}");
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.6000000000000001, "0.6"),
            (-12.34, "-12.3"),
            (1234.6, "1235"),
            (5e-4, "5e-4"),
            (1.25e-5, "1.25e-5"),
            (100.0, "100"),
            (2.5e7, "2.5e7"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn every_point_lies_on_the_drawing() {
        for points in [
            vec![(1.0, 2.0)],
            vec![(1.0, 0.0), (2.0, 0.0)],
            (1..5000).map(|step| (step as f64, (step as f64).sin() * 1e9)).collect(),
        ] {
            let drawing = chart(points).drawing();
            let text = serde_json::to_string(&drawing).unwrap();
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
            let in_paths = drawing.paths.iter().flat_map(|path| path.points.split_whitespace());
            let on_paths = in_paths.map(|point| point.split_once(',').unwrap());
            let on_dots = drawing.dots.iter().map(|dot| (dot.x.as_str(), dot.y.as_str()));
            let mut count = 0;
            for (x, y) in on_paths.chain(on_dots) {
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                let holds = (LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y);
                assert!(holds, "{x},{y}");
                count += 1;
            }
            assert!(count > 0 && text.len() < 60_000, "{count} places in {} bytes", text.len());
        }
    }

    /// A tooltip must not pass an evaluation of another step, or a shorter run's last value, for the value at its step.
    #[test]
    fn a_tooltip_says_the_step_of_a_value_that_is_not_of_its_own() {
        let line =
            |name: &'static str, points| Line { name: name.into(), points, style: 0, kind: LineKind::Exact };
        let steps = (1..=8).map(|step| (step as f64, step as f64 / 2.0)).collect();
        let lines = vec![line("training", steps), line("evaluation", vec![(4.0, 9.0)])];
        let drawing = Chart::of("Loss", "", false, lines).unwrap().drawing();
        assert_eq!(drawing.strips[3].text, "step 4\ntraining 2\nevaluation 9");
        assert_eq!(drawing.strips[5].text, "step 6\ntraining 3\nevaluation 9 (step 4)");
    }

    #[test]
    fn nothing_to_show_is_no_chart_and_words_tell_the_rest() {
        assert!(
            Chart::of(
                "Loss",
                "",
                false,
                vec![Line { name: "train".into(), points: vec![], style: 0, kind: LineKind::Noisy }]
            )
            .is_none()
        );
        let spoken = chart(vec![(1.0, 4.0), (9.0, 0.5)]).spoken();
        assert_eq!(spoken, "Loss: train from 4 at step 1 to 0.5 at step 9.");
    }

    #[test]
    fn smoothing_keeps_a_straight_line_and_both_ends() {
        let points: Vec<(f64, f64)> = (0..100).map(|step| (step as f64, 3.0 - 0.5 * step as f64)).collect();
        let smoothed = smooth(&points);
        assert_eq!(smoothed.len(), points.len());
        for (smoothed, point) in smoothed.iter().zip(&points) {
            assert!((smoothed.1 - point.1).abs() <= 1e-9, "{smoothed:?} for {point:?}");
        }
        let alternating: Vec<(f64, f64)> = (0..100).map(|step| (step as f64, (step % 2) as f64)).collect();
        for at in [0, 50, 99] {
            let value = smooth(&alternating)[at].1;
            assert!((value - 0.5).abs() <= 0.1, "noise stays at {at}: {value}");
        }
        // A share stays one.
        let full: Vec<(f64, f64)> = (0..40).map(|step| (step as f64, f64::from(step > 30))).collect();
        assert!(smooth(&full).iter().all(|point| (0.0..=1.0).contains(&point.1)));
    }
}
