// The comparison of two pictures that lie on top of each other, with a dividing line that mouse, touch and keyboard move.

/**
 * Connect a figure with its range input. The input, from 0 to 100, serves the keyboard and screen readers; a pointer may be anywhere on the
 * figure. The position goes to the custom property --split of the figure, which the style sheet uses.
 */
export function connectSlider(figure, input) {
  const show = () => {
    figure.style.setProperty("--split", `${input.value}%`);
    input.setAttribute("aria-valuetext", `${Math.round(input.value)}% original, ${Math.round(100 - input.value)}% restored`);
  };
  const follow = (event) => {
    const box = figure.getBoundingClientRect();
    input.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  figure.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    figure.setPointerCapture(event.pointerId);
    event.preventDefault(); // otherwise the browser drags the picture and takes the focus from the input
    input.focus({ preventScroll: true });
    follow(event);
  });
  figure.addEventListener("pointermove", (event) => {
    if (figure.hasPointerCapture(event.pointerId)) follow(event);
  });
  input.addEventListener("input", show);
  show();
}
