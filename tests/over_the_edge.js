// The controls and words of the page that reach over the window's left or right edge.
() => [...document.querySelectorAll("button, input, textarea, label, img, select, p")]
    .filter(e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}))
    .map(e => [e, e.getBoundingClientRect()])
    .filter(([e, box]) => box.width && (box.left < -1 || box.right > innerWidth + 1))
    .map(([e, box]) => `${e.tagName} ${e.ariaLabel || e.textContent.slice(0, 30)}: ${box.left} to ${box.right}`)
